"""How good is a model? Scores with exact definitions and intervals.

    perplexity.py   every token of every document, once: nats, perplexity, bits per byte, accuracy

Read perplexity.py first.
"""
