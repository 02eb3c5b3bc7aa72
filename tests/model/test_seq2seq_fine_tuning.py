"""Text from text, learned by `Seq2SeqTrainer`: what the head with the decoder is there for."""

import torch
from model_parity import SHAPE
from torch.nn import functional as F
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from fat5.model import FlashT5Config, FlashT5ForConditionalGeneration

PAD, END, FIRST, SECOND = 0, 1, 91, 92
WORDS = (10, 20)


def marked(rows, generator):
    """Texts, and to be written of each the word behind the first mark and, if it is there, behind the second."""
    data = []
    for row in range(rows):
        ids = torch.randint(*WORDS, (9,), generator=generator)
        ids[-1] = END
        first, second = torch.randint(0, 3, (2,), generator=generator).tolist()
        ids[first] = FIRST
        labels = [ids[first + 1], END, -100]
        if row % 2:
            ids[4 + second] = SECOND
            labels = [ids[first + 1], ids[5 + second], END]
        data.append({"input_ids": ids, "labels": torch.tensor(labels)})
    return data


def share_right(prediction):
    """How many rows are generated to the very end: the start token, the labels, and nothing else."""
    written, labels = torch.as_tensor(prediction.predictions)[:, 1:], torch.as_tensor(prediction.label_ids)
    written = F.pad(written, (0, labels.shape[1] - written.shape[1]), value=PAD)
    return {"right": (written == labels.masked_fill(labels == -100, PAD)).all(1).float().mean().item()}


def test_trainer_fine_tunes_to_near_perfection_on_texts_it_has_not_seen(tmp_path):
    generator = torch.Generator().manual_seed(5)
    train, held_out = marked(2048, generator), marked(128, generator)
    torch.manual_seed(2)
    model = FlashT5ForConditionalGeneration(FlashT5Config(**SHAPE))
    arguments = Seq2SeqTrainingArguments(
        output_dir=tmp_path,
        max_steps=400,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        learning_rate=1e-2,
        warmup_steps=20,
        predict_with_generate=True,
        generation_max_length=4,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        seed=1,
    )
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=train, eval_dataset=held_out, compute_metrics=share_right)
    assert trainer.evaluate()["eval_right"] < 0.1
    trainer.train()
    assert trainer.evaluate()["eval_right"] > 0.98
