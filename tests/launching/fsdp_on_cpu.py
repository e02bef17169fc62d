"""Makes an FSDP config real on CPU: accelerate 1.15 turns it into plain DDP there, in silence, because AcceleratorState
looks for FSDP only below MULTI_GPU and the like (accelerate/state.py, AcceleratorState.__init__). For tests alone."""

from accelerate.state import AcceleratorState, DistributedType, PartialState


def enable() -> None:
    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        PartialState(kwargs.get("cpu", True))
        shared = PartialState._shared_state
        if fsdp_plugin is None or shared["distributed_type"] != DistributedType.MULTI_CPU:
            return init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        shared["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        shared["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_with_fsdp
