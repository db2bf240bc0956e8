"""Looking inside: read any activation, change it, differentiate it, and say what that shows.

    taps.py         record, patch and chain taps; gradients with respect to any activation
    lens.py         what would the model say if it stopped here?
    attention.py    where does each head look, beyond chance?
    nodes.py        the parts that write to the residual stream, and the parts that read it
    induction.py    heads that go on with what followed last time, and the pairs that make them
    pairs.py        two prompts that differ, a metric, and the share of its difference that comes back
    patching.py     which activation carries the difference between two prompts?
    paths.py        what does one part tell another, when nobody in between may answer?
    ablation.py     what is a part worth?
    tracing.py      where does a spoiled answer come back?
    attribution.py  what does each part add to the logit, and what would patching it do?
    steering.py     add a direction while the model writes
    report.py       all of it on one page of HTML

Read taps.py first.
"""
