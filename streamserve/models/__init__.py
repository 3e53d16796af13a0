"""The models served: configuration, layers, and their way from and to disk."""

from streamserve.models.checkpoint import Checkpoints
from streamserve.models.config import ModelConfig
from streamserve.models.hf_config import from_hf
from streamserve.models.load import Model, export_hf, load_config, load_model, place, resolve_path
from streamserve.models.sharding import param_shardings
from streamserve.models.transformer import abstract_params, forward_fns, hidden_states, init_params, kv_shape

__all__ = [
    "Checkpoints",
    "Model",
    "ModelConfig",
    "abstract_params",
    "export_hf",
    "forward_fns",
    "from_hf",
    "hidden_states",
    "init_params",
    "kv_shape",
    "load_config",
    "load_model",
    "param_shardings",
    "place",
    "resolve_path",
]
