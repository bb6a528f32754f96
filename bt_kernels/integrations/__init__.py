"""The ops of ``bt_kernels`` in models of other packages. Import the module of the package by its name.

* ``bt_kernels.integrations.timesformer``: TimeSformer of Hugging Face transformers.
* ``bt_kernels.integrations.diffusers``: motion modules (AnimateDiff and similar) of diffusers.

Each has ``use(model)``, which changes the model in place but no weight and no name in the state dict, and
``restore(model)``, which reverts it.
"""
