"""The script of sft_plain.py with two added lines: the import of retain, and the callback.

python examples/sft_two_lines.py [MODEL] [STEPS] [OUT]
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from retain import RetentionCallback, fit_curvature

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
STEPS = int(sys.argv[2]) if len(sys.argv) > 2 else 50
OUT = sys.argv[3] if len(sys.argv) > 3 else "runs/sft"

rows = [
    {"prompt": f"Ana has {a} pens and buys {b} more. How many?\n", "completion": f"{a}+{b}={a + b}"}
    for a in range(2, 42)
    for b in range(3, 13)
]
tokenizer = AutoTokenizer.from_pretrained(MODEL)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
    args=SFTConfig(
        output_dir=OUT,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
)
trainer.add_callback(RetentionCallback(fit_curvature(trainer.model, "self", tokenizer=tokenizer)))
trainer.train()
trainer.save_model(OUT)
