"""Batch norms with the statistics that they came with, in a model in training mode."""

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from orpo_dist import ORPOTrainer
from orpo_dist.model.patches import undo_all
from orpo_dist.model.running_statistics import keep_running_statistics
from tests.model.tiny_vlms import drawing, tiny_processor, tiny_vlm
from tests.trainer_runs import config


def test_outputs_do_not_depend_on_the_batch():
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(0.5)
    model, images = nn.Sequential(norm), torch.randn(4, 3, 2, 2)
    handles = keep_running_statistics(model)
    together = model.train()(images)
    assert torch.equal(together, torch.cat([model.train()(image[None]) for image in images]))
    assert norm.running_mean.tolist() == [0.5] * 3 and norm.num_batches_tracked == 0
    undo_all(handles)
    model.train()(images)
    assert norm.num_batches_tracked == 1


class NormedPatches(nn.Conv2d):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, pixels):
        return self.norm(super().forward(pixels))


def test_a_run_does_not_change_a_frozen_tower(tmp_path):
    model, processor = tiny_vlm("llava"), tiny_processor("llava")
    embeddings = next(module for module in model.modules() if isinstance(module, CLIPVisionEmbeddings))
    embeddings.patch_embedding = NormedPatches(3, 16, kernel_size=4, stride=4, bias=False)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    rows = [
        {
            "images": [drawing(20 + i, 20, i)],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
            "chosen": [{"role": "assistant", "content": f"answer {i}"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for i in range(4)
    ]
    ORPOTrainer(model, config(tmp_path, max_steps=1), train_dataset=rows, processing_class=processor).train()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert not any(module._forward_pre_hooks for module in model.modules() if isinstance(module, nn.BatchNorm2d))
