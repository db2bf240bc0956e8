"""How good is a model? Scores with exact definitions and intervals.

    perplexity.py   every token of every document, once: nats, perplexity, bits per byte, accuracy
    calibration.py  does the model know when it is right?
    choice.py       which of these endings, and what is the last word?
    comparison.py   which of two models is better, and can one tell?
    harness.py      an adapter to the Language Model Evaluation Harness

Read perplexity.py first.
"""
