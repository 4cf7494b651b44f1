"""A plugin of vLLM that serves an export as it was trained: vLLM's network, the export's own processor.

Shipped inside every export, in a folder that is put on PYTHONPATH (`tools/serve_vllm.sh` does), and installed
with this project (entry point `vllm.general_plugins`, extra `vllm`). It knows nothing of pictures, labels and
templates: for those it asks the remote code of the export that is served. Besides the folder it needs

    VLLM_MEDIA_CONNECTOR=eagle2_5                 # files reach the export's code as they were sent
    --tokenizer-mode eagle2_5                     # text that spells special tokens stays text
    --chat-template-content-format openai         # the export's own template places media
    --trust-remote-code                           # the export's code
"""

from .export import NAME


def register() -> None:
    """Make the plugin's parts known to vLLM; it calls this in each of its processes, maybe several times."""
    from vllm import ModelRegistry
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from .media import FileConnector

    ModelRegistry.register_model("Eagle2_5_VLForConditionalGeneration", f"{__name__}.network:Eagle2_5_VL")
    MEDIA_CONNECTOR_REGISTRY.register(NAME)(FileConnector)
    # The mode names both; the tokenizer itself is an ordinary one.
    RENDERER_REGISTRY.renderers[NAME] = (f"{__name__}.renderer", "Eagle2_5_VLRenderer")
    TokenizerRegistry.tokenizers[NAME] = TokenizerRegistry.tokenizers["hf"]
