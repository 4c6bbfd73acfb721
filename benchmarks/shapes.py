"""The adapters that benchmarks average: the shapes of their tensors, all float32."""

# A rank-16 LoRA on all seven linear layers of each of the 32 blocks of a 7B Llama: 448 tensors, 160 MB.
_LLAMA = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
LARGE = [shape for _ in range(32) for n, m in _LLAMA for shape in ((16, n), (m, 16))]
# A rank-8 LoRA on the attention of a small model: 120 tensors, 1.8 MB.
SMALL = [shape for _ in range(30) for shape in ((8, 576), (576, 8), (8, 576), (192, 8))]
CASES = {"large": LARGE, "small": SMALL}
