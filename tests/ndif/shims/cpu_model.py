"""A model actor for machines without CUDA: weights stay in main memory, everything else is NDIF's own."""

import gc
import os

import ray
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel


class _OnCPU(BaseModelDeployment):
    CACHEABLE = False  # parking moves weights from a GPU to main memory, where these are anyway

    def load_from_disk(self):
        loaded = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, device="cpu", dtype=self.dtype_name, **self.kwargs
        )
        loaded._module.requires_grad_(False)
        return loaded

    def cleanup(self):
        # The original, less its calls to torch.cuda, which raise where there is no driver.
        self.execution_ident = self.kill_reason = None
        self.kill_switch.clear()
        self.model.interleaver.cancel()
        gc.collect()


class _InSandbox(SandboxModelDeployment, _OnCPU):
    def execute(self, request):
        # Without a user database every request counts as trusted, and would never see the sandbox.
        request.trusted = False
        return super().execute(request)


_deployment = _InSandbox if os.environ.get("PERSONA_LENS_TEST_SANDBOX") else _OnCPU
CPUModelActor = ray.remote(num_cpus=1, max_restarts=-1)(type("CPUModelActor", (_deployment,), {}))
