"""What `reload` asks of each of vLLM's workers; `vllm serve --worker-extension-cls` takes the class."""

from typing import Any


class ReloadWorker:
    """Added to vLLM's worker, whose `model_runner` it uses."""

    model_runner: Any

    def load_export(self, folder: str) -> None:
        """Load the weights in `folder` in place of those of the same names and shapes.

        vLLM packs what it has loaded, where its CPU layers have a packed form. An output layer that is tied
        is a layer of its own over the embedding's weight, and is not packed again: it would go on with the
        old one. Experts are packed only with a new kernel: without one, bare weights would be read as packed.
        """
        language = self.model_runner.get_model().get_language_model()
        for layer in language.modules():
            experts = getattr(layer, "w13_weight", None)
            if experts is not None and experts.device.type == "cpu":
                layer.quant_method.moe_kernel = None
        self.model_runner.reload_weights(weights_path=folder)
        head, embedding = language.lm_head, getattr(language.model, "embed_tokens", None)
        if head is not embedding and getattr(head, "weight", None) is getattr(embedding, "weight", 0):
            head.quant_method.process_weights_after_loading(head)
