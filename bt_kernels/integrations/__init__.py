"""The ops of ``bt_kernels`` in models of other packages, each module imported by name when wanted.

* ``bt_kernels.integrations.timesformer``: TimeSformer of Hugging Face transformers.
* ``bt_kernels.integrations.diffusers``: motion modules (AnimateDiff and kin) of diffusers.

Each has ``use(model)``, which works in place and changes no weight and no name in the state dict, and
``restore(model)``, which undoes it.
"""
