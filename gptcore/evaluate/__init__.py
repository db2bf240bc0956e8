"""How good is a model? Scores with exact definitions and intervals.

    perplexity.py   every token of every document, once: nats, perplexity, bits per byte, accuracy
    choice.py       which of these endings, and what is the last word?

Read perplexity.py first.
"""
