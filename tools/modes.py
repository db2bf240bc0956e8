"""The three ways to train, by name: every size in one place."""

MODES = {
    "quick": {
        "n_layer": 4, "d_model": 128, "n_head": 4, "d_ff": 512, "tokens_per_epoch": 10_000_000, "epochs": 10,
        "tokenizer": "bpe:4096", "minutes": 5.0, "least_updates": 1500, "cache_gb": 1.0,
        # benchmarks/quality.py, held-out bits per byte after 0.8M tokens of python-docs: gpt2 1.847, qwen3 1.765, and
        # 1.722 where an update is 2,048 tokens instead of 4,096. AdamW instead of Muon and wsd: 2.12 for 1.63, once.
        # Five minutes are some eight passes over python-docs. In one run each with a decay of 0.01 the held-out text is
        # best after six tenths of them (1.454) and ends at 1.517; with 0.2 it ends at 1.339.
        "arch": "qwen3", "optimizer": "muon", "schedule": "wsd", "weight_decay": 0.2,
    },
    "medium": {
        "n_layer": 4, "d_model": 256, "n_head": 4, "d_ff": 1024, "tokens_per_epoch": 50_000_000, "epochs": 15,
        "arch": "gpt2", "tokenizer": "cl100k_base", "minutes": None, "least_updates": 0, "cache_gb": 5.0,
    },
    "full": {
        "n_layer": 6, "d_model": 256, "n_head": 4, "d_ff": 1024, "tokens_per_epoch": 100_000_000, "epochs": 20,
        "arch": "gpt2", "tokenizer": "cl100k_base", "minutes": None, "least_updates": 0, "cache_gb": 10.0,
    },
}  # fmt: skip

N_CONTEXT = 256
MICRO_BATCH = 1024  # tokens; an update is accumulation_steps of them
ACCUMULATION = 16
RATES = {"adamw": 3e-4, "muon": 6e-3}  # AdamW's peak rate, by itself and beside Muon
PROMPTS = ("The", "In the", "She was")  # continued at every epoch's end
