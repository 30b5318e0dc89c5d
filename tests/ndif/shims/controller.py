"""NDIF's controller, made to fit the nnsight beside it.

ndif 0.1.2 hands ``trust_remote_code`` to two functions that took it in nnsight 0.8.0; in 0.8.1 it is part of the
model's key, and the argument is an error.
"""

import ray
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from nnsight.modeling.mixins.remotable import Remotable


def _without_flag(method):
    def call(cls, *arguments, trust_remote_code=False):
        return method.__func__(cls, *arguments)

    return classmethod(call)


@ray.remote(num_cpus=1, num_gpus=0, max_restarts=-1, resources={"head": 1})
class Controller(_ControllerActor):
    def __init__(self, *arguments, **options):
        for name in ("describe_checkpoint", "max_tp_size"):
            setattr(Remotable, name, _without_flag(getattr(Remotable, name)))
        super().__init__(*arguments, **options)
