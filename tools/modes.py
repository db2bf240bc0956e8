"""The three ways to train, by name: every size in one place."""

MODES = {
    "quick": {
        "n_layer": 4, "d_model": 128, "n_head": 4, "d_ff": 512, "tokens_per_epoch": 10_000_000, "epochs": 10,
        "tokenizer": "bpe:4096", "minutes": 5.0, "least_updates": 1000, "cache_gb": 1.0,
        # Held-out bits per byte after --steps 600 --accumulation-steps 4 --epochs 4 on python-docs: 1.63 with these
        # two, 2.12 with --optimizer adamw --lr 3e-3 --schedule cosine.
        "optimizer": "muon", "schedule": "wsd",
    },
    "medium": {
        "n_layer": 4, "d_model": 256, "n_head": 4, "d_ff": 1024, "tokens_per_epoch": 50_000_000, "epochs": 15,
        "tokenizer": "cl100k_base", "minutes": None, "least_updates": 0, "cache_gb": 5.0,
    },
    "full": {
        "n_layer": 6, "d_model": 256, "n_head": 4, "d_ff": 1024, "tokens_per_epoch": 100_000_000, "epochs": 20,
        "tokenizer": "cl100k_base", "minutes": None, "least_updates": 0, "cache_gb": 10.0,
    },
}  # fmt: skip

N_CONTEXT = 256
MICRO_BATCH = 1024  # tokens; an update is accumulation_steps of them
ACCUMULATION = 16
RATES = {"adamw": 3e-4, "muon": 6e-3}  # AdamW's peak rate, by itself and beside Muon
PROMPTS = ("The", "In the", "She was")  # continued at every epoch's end
