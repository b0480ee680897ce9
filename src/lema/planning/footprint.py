"""Bytes a memory plan takes on the host and on the device.

It knows sizes and decisions as numbers; it knows nothing of rates, budgets or which plan is better. Formulas are in
docs/ARCHITECTURE.md, "The plan".
"""

from __future__ import annotations

from dataclasses import dataclass

from ..machine.cuda import WORKSPACE_BYTES
from ..machine.device import context_bytes
from .plan import LayerCost, MemoryPlan, ModelSizes, Workload, loss_chunk

HEAD_CHUNK_BYTES = 16 << 20
"""Of a run of head rows that is multiplied at once, roughly; of what is there whole, too."""
CPU_OVERHEAD = 112 << 20
"""Host bytes beyond the import floor that no tensor accounts for: threads, code paged in, compiled kernels. Measured on
two models, what is left after everything counted: 107 to 120 MiB."""
DEVICE_OVERHEAD = WORKSPACE_BYTES
"""Device bytes beyond the tensors counted: matmul workspaces, which the caching allocator counts too."""
DEVICE_CONTEXT = "context"
"""Name of the part of a plan's device bytes that torch does not count; see `cuda.CONTEXT_BYTES`."""
HEAP_SLACK = 0.7
"""Share by which a layer's resident size on the C heap exceeds its activations alive at once: holes between them.
Measured per layer on a 1.7B shape in bf16: 0.4 to 1.0."""
IDLE_HEAP_SHARE = 0.5
"""Of all activations: what the heap grows to beyond those alive at once, if nothing freed is given back. Measured on a
1.7B shape in bf16 with every activation kept: 0.41, and a little more so that nothing is given back."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of plans for one model and one batch.

    Args:
        sizes: the model's parts.
        workload: the batch.
        device: kind of the device that computes, 'cpu' among them.
    """

    sizes: ModelSizes
    workload: Workload
    device: str

    @property
    def on_cpu(self) -> bool:
        """Whether host and device are the same memory."""
        return self.device == "cpu"

    def host(self, plan: MemoryPlan) -> dict[str, int]:
        """Host bytes above the import floor, by what they are for."""
        sizes, work = self.sizes, self.workload
        disk = [sizes.units[u] for u in plan.from_disk]
        passing = disk if self.on_cpu else [sizes.units[u] for u in (*plan.from_disk, *plan.on_device)]
        parts = {
            "overhead": CPU_OVERHEAD,
            "slots": min(plan.host_slots, len(passing)) * max(passing, default=0)
            + (sizes.scratch if self.on_cpu else 0),
            "layers kept in RAM": sum(sizes.units[u] for u in (*plan.in_ram, *plan.mapped)),
            "embedding rows": min(sizes.embedding, work.batch * work.seq * 4096),
        }
        if self.on_cpu:
            parts.update(self._compute_place(plan))
        else:
            if plan.head not in ("resident", "mapped"):
                parts["head"] = sizes.head if plan.head_in_ram else self._head_bytes(plan)
            if plan.boundaries == "host":
                parts["boundaries"] = max(len(sizes.units) - len(plan.keep_activations), 1) * work.boundary
            if plan.optimizer == "host":
                parts["optimizer"] = sizes.lora * 16
        return parts

    def on_device(self, plan: MemoryPlan) -> dict[str, int]:
        """Bytes of device memory this process takes, by what they are for; empty on CPU."""
        if self.on_cpu:
            return {}
        sizes = self.sizes
        shared = [sizes.units[u] for u in plan.streamed_to_compute]
        return {
            DEVICE_CONTEXT: context_bytes(self.device),
            "overhead": DEVICE_OVERHEAD,
            "slots": min(plan.device_slots, len(shared)) * max(shared, default=0) + sizes.scratch,
            "layers kept on the device": sum(sizes.units[u] for u in plan.on_device),
            **self._compute_place(plan),
        }

    def transient(self, plan: MemoryPlan) -> int:
        """Most bytes on the heap that one layer or the loss takes and gives back."""
        layer = self.layer(plan.micro_batch_size)
        alive = max(layer.forward_peak, layer.backward_peak, self.loss_peak(plan))
        return int(alive * (1 + HEAP_SLACK)) + layer.kernel_scratch

    def idle_heap(self, plan: MemoryPlan) -> int:
        """What the heap grows to beyond `host` where activations are kept on it and nothing freed is given back."""
        if not self.on_cpu or not plan.keep_activations:
            return 0
        return int(self._compute_place(plan)["activations"] * IDLE_HEAP_SHARE)

    def kept_graphs(self, plan: MemoryPlan) -> int:
        """Of all activations kept from forward to backward."""
        return len(plan.keep_activations) * sum(count * self.layer(rows).graph for count, rows in self.cuts(plan))

    def head_rows(self, head: str) -> int:
        """Vocabulary rows of a chunk of the head; all of them unless it is chunked."""
        if head != "chunked" or not self.sizes.head:
            return self.sizes.vocab
        return max(1, min(self.sizes.vocab, HEAD_CHUNK_BYTES * self.sizes.vocab // self.sizes.head))

    def loss_positions(self, plan: MemoryPlan) -> int:
        """Target positions of a piece of the loss."""
        total = self.workload.batch * self.workload.seq
        return min(loss_chunk(plan.loss_chunk_size, total, self.sizes.vocab) or total, total)

    def layer(self, rows: int) -> LayerCost:
        """Of one micro-batch of this many rows."""
        return self.workload.layer(min(rows, self.workload.batch))

    def cuts(self, plan: MemoryPlan) -> list[tuple[int, int]]:
        """How many micro-batches of how many rows."""
        whole, rest = divmod(self.workload.batch, plan.micro_batch_size)
        return [(count, rows) for count, rows in ((whole, plan.micro_batch_size), (1, rest)) if count and rows]

    def _compute_place(self, plan: MemoryPlan) -> dict[str, int]:
        """What lies where layers are computed, whichever memory that is."""
        sizes, work = self.sizes, self.workload
        kept = plan.keep_activations
        layer = self.layer(plan.micro_batch_size)
        graph = sum(count * self.layer(rows).graph for count, rows in self.cuts(plan))
        loss = self.loss_peak(plan)
        head = self._head_bytes(plan)
        comes_and_goes = plan.head == "streamed" and self.on_cpu  # on a device a whole head stays
        held = sizes.rest + (0 if comes_and_goes else head)
        offloaded = plan.boundaries == "host" and not self.on_cpu
        waiting = 2 if offloaded else len(sizes.units) - len(kept)
        bound = (waiting + self._inputs_in_no_graph(plan)) * work.boundary
        # the sweep's phases: most bytes at once beside what is always there
        graphs = self.kept_graphs(plan)
        head_then = head if comes_and_goes else 0
        slack = 1 + (HEAP_SLACK if self.on_cpu else 0)
        scratch = layer.kernel_scratch if self.on_cpu else 0
        turn = graphs + int(loss * slack) + 2 * work.boundary + head_then
        forward = graphs + int(layer.forward_peak * slack) + scratch + work.boundary
        backward = max(graphs - graph, 0) + int(layer.backward_peak * slack) + scratch + 2 * work.boundary
        activations = max(turn, forward, backward)
        return {
            "rest of the model": held,
            "adapters": sizes.lora * (16 if plan.optimizer == "device" or self.on_cpu else 8),
            "boundaries": bound,
            "activations": activations,
        }

    def _inputs_in_no_graph(self, plan: MemoryPlan) -> int:
        """Layers with their graph kept whose input is not the output in another such graph, or not in one piece."""
        kept = set(plan.keep_activations)
        cut = plan.micro_batch_size < self.workload.batch
        return sum(cut or unit - 1 not in kept for unit in kept)

    def loss_peak(self, plan: MemoryPlan) -> int:
        """Of head and loss for one chunk of targets."""
        work = self.workload
        positions = self.loss_positions(plan)
        peak = work.loss(positions).peak
        cut = loss_chunk(plan.loss_chunk_size, work.batch * work.seq, self.sizes.vocab) is not None
        rows = plan.head_rows if plan.head == "chunked" else self.head_rows("chunked" if cut else plan.head)
        if rows < self.sizes.vocab:  # float32 sums of the hidden states' size beside one chunk's logits
            peak = peak * rows // self.sizes.vocab + 4 * work.boundary
        return peak

    def _head_bytes(self, plan: MemoryPlan) -> int:
        if plan.head == "chunked":
            return min(2 * plan.head_rows * self.sizes.head // max(self.sizes.vocab, 1), self.sizes.head)
        return self.sizes.head
