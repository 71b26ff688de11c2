"""The model facade: a transformers model whose blocks are computed by a swarm."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import ModelOutput

from swarm.errors import UsageError

from .cache import SwarmCache
from .ends import put_blocks_in
from .head import combine_head
from .model_session import ModelSession, open_session_of
from .remote_blocks import RemoteBlocks
from .streaming import stream_tokens

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from .hop import Hop
    from .swarm_connection import SwarmConnection

# The facade is always mixed into some family's ForCausalLM class. That is only known when it is made, so to type
# checkers what is inherited is Any.
_Family: Any = object


class SwarmModelForCausalLM(_Family):
    """A causal language model whose blocks are on the nodes of a swarm, and whose two ends are here.

    ``from_pretrained`` gives an instance of the family's own transformers class (``LlamaForCausalLM``, …), so
    ``generate()`` with all that it can do, ``model(input_ids, labels=…)``, ``save_pretrained`` (of the ends) and
    ``to(device)`` are transformers' own.

    Example::

        from swarm.client import SwarmModelForCausalLM

        with SwarmModelForCausalLM.from_pretrained(
            "meta-llama/Llama-3.1-8B-Instruct", initial_peers=["/ip4/…/tcp/…/p2p/…"]
        ) as model:
            ids = tokenizer("Hello", return_tensors="pt").input_ids
            print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))

    Batches are padded on the left, with an ``attention_mask``. What is between the blocks stays on the nodes:
    ``output_hidden_states`` and ``output_attentions`` raise ValueError; use :attr:`blocks` instead.

    Attributes:
        blocks: the model's blocks as a module: ``model.blocks[3:9](hidden)``.
    """

    blocks: RemoteBlocks
    _connection: Any
    _closer: Any
    _last_route: Any

    # Making and ending one

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        initial_peers: Sequence[str],
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        dht_prefix: str | None = None,
        weights: str = "hub",
        manifest: str | None = None,
        **settings: Any,
    ) -> SwarmModelForCausalLM:
        """Join a swarm and load the two ends of one of its models.

        Args:
            model: a local directory, a Hub id, or ``"demo"``. With ``weights="peers"`` its name in the swarm, or its
                manifest's root: the tokenizer is then in :attr:`files`.
            initial_peers: multiaddresses of nodes that are in the swarm.
            dtype: of the ends: ``"auto"`` for the checkpoint's own, else a torch dtype or its name.
            revision, token, cache_dir: as in transformers.
            dht_prefix: the model's name in the swarm, if it isn't the usual one.
            weights: where the ends come from: ``"hub"`` (a directory, or else the Hub), ``"peers"`` (nodes that hand
                weights out), or ``"auto"`` (a directory, else peers, else the Hub).
            manifest: the root of the manifest that weights from peers must have, as ``swarm-node seed`` prints it.
            **settings: fields of :class:`swarm.client.ClientSettings`.

        Raises:
            ModelError: the model can't be found or used.
            ConnectError: none of ``initial_peers`` answers.
        """
        from swarm.skeleton import load_ends

        from .find_model import find_model
        from .settings import ClientSettings
        from .swarm_connection import SwarmConnection

        chosen = ClientSettings(**settings)
        ends_dtype = _dtype_named(dtype)
        source = find_model(
            model,
            initial_peers,
            weights=weights,
            manifest=manifest,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            dht_prefix=dht_prefix,
            startup_timeout=chosen.startup_timeout,
        )
        # Before the weights: whether the swarm answers is known in a moment, a download can take minutes.
        connection = SwarmConnection.open(source, initial_peers, chosen)
        try:
            return cls.from_ends(load_ends(source, dtype=ends_dtype), connection, deterministic=chosen.deterministic)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def from_ends(
        cls, ends: PreTrainedModel, connection: SwarmConnection, *, deterministic: bool = False
    ) -> SwarmModelForCausalLM:
        """Turn ``ends``, a family's model with an empty list of layers, into a model over ``connection``.

        Takes both over: ``ends`` itself becomes the result, and closing the result closes ``connection``.

        Raises:
            ModelError: the family isn't supported.
        """
        facade = SwarmModelForCausalLM if issubclass(cls, PreTrainedModel) else cls  # cls: a facade class, or an own
        blocks = RemoteBlocks(connection, 0, connection.num_blocks)
        put_blocks_in(ends, blocks)
        combine_head(ends, deterministic=deterministic)
        ends.__class__ = _facade_class(facade, type(ends))  # type: ignore[arg-type]  # classes are hashable
        ends.eval()
        model: Any = ends
        model.blocks = blocks
        model._connection = connection
        model._closer = weakref.finalize(model, _close_collected, connection)
        model._last_route = []
        result: SwarmModelForCausalLM = model
        return result

    def close(self) -> None:
        """Leave the swarm. Sessions that are open end. May be called twice; garbage collection does it too."""
        if self._closer.detach() is not None:
            self._connection.close()

    def __enter__(self) -> SwarmModelForCausalLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Using it

    @property
    def files(self) -> Path:
        """The directory (or GGUF file) that the model was made from: ``AutoTokenizer.from_pretrained(model.files)``."""
        found: Path = self._connection.files
        return found

    @property
    def active_adapter(self) -> str | None:
        """The LoRA adapter, by its name in the swarm, that what begins from now on goes through; None: only the base
        weights. A session keeps the one that it was made with, a backward that of its forward.

        Example::

            model.active_adapter = "my-adapter"    # on nodes with swarm-node serve … --adapters …/my-adapter
        """
        adapter: str | None = self._connection.active_adapter
        return adapter

    @active_adapter.setter
    def active_adapter(self, name: str | None) -> None:
        self._connection.active_adapter = name

    @property
    def last_route(self) -> list[Hop]:
        """The hops (``.peer_id``, ``.start``, ``.end``) of the ``generate()`` that ended last; empty before one."""
        return list(self._last_route)

    def session(self, *, max_length: int) -> ModelSession:
        """A session with room for ``max_length`` columns, prompt included: see :class:`ModelSession`.

        Nothing happens on the network before its first step.
        """
        if max_length < 1:
            raise ValueError(f"max_length has to be positive, not {max_length}")
        return ModelSession(self, self._cache(max_length, remember=True), max_length)

    def stream(
        self, inputs: Tensor | None = None, *, session: ModelSession | None = None, **kwargs: Any
    ) -> AsyncIterator[int | Tensor]:
        """``generate()`` for asyncio: its tokens as they come, without the prompt.

        Takes what ``generate`` takes, except beams. Leaving the loop early stops it at the next token.

        Yields:
            A token id per step for one row, else an int64 tensor ``[batch]``.

        Example::

            async for token in model.stream(input_ids, max_new_tokens=50, do_sample=True):
                print(tokenizer.decode(token), end="", flush=True)
        """
        if "streamer" in kwargs:
            raise ValueError("stream() has a streamer of its own; use generate() with yours")

        def generate(streamer: BaseStreamer) -> object:
            return self.generate(inputs, session=session, streamer=streamer, **kwargs)

        return stream_tokens(generate)

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, *args: Any, session: ModelSession | None = None, **kwargs: Any
    ) -> ModelOutput | Tensor:
        """transformers' ``generate`` with all its options: sampling, beams, stopping criteria, streamers, assistants.

        Args:
            inputs, *args, **kwargs: as there. ``inputs``: ``[batch, tokens]`` int64, padded on the left.
            session: go on in this one. Default: the one whose ``with`` is open, or else one just for this call.

        Returns:
            As there. ``past_key_values`` of a returned dict is None unless a session was given, since
            the one for just this call is closed.

        Raises:
            ValueError: padding that isn't on the left, or more tokens than the session has room for.
            MissingBlocksError: nobody serves some of the model's blocks.
        """
        given = kwargs.get("past_key_values")
        if given is not None and not isinstance(given, SwarmCache):
            raise ValueError(f"past_key_values has to be a session's cache (session.cache), not {type(given).__name__}")
        chosen = session or (open_session_of(self) if given is None else None)
        cache = given if chosen is None else chosen.cache
        if cache is not None:
            self._resume(cache, inputs, kwargs)
            kwargs["past_key_values"] = cache
            try:
                return super().generate(inputs, *args, **kwargs)
            finally:
                self._last_route = cache.route
        cache = kwargs["past_key_values"] = self._cache(None)
        try:
            result = super().generate(inputs, *args, **kwargs)
        finally:
            cache.close()
            self._last_route = cache.route
        if isinstance(result, ModelOutput):
            result["past_key_values"] = None
        return result

    # Where transformers' generate() asks the model

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        # Assisted generation feeds the whole prompt at first, whatever the cache holds already.
        if (
            isinstance(past_key_values, SwarmCache)
            and next_sequence_length is None
            and is_first_iteration
            and inputs_embeds is None
            and not past_key_values.only_new_ids
            and 0 < past_key_values.get_seq_length() < input_ids.shape[1]
        ):
            next_sequence_length = input_ids.shape[1] - past_key_values.get_seq_length()
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        return prepared

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.is_assistant:
            raise ValueError("the assistant guesses tokens one by one, so it has to be a model on this machine")
        cache: SwarmCache = model_kwargs["past_key_values"]
        if generation_config.use_cache is False:
            del model_kwargs["past_key_values"]
            return
        if generation_config.cache_implementation is not None:
            raise ValueError("cache_implementation can't be chosen: the cache is on the nodes of the swarm")
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            # A guess from the prompt may reach beyond the end before it is cut off; an assistant's stops there.
            max_cache_length += 1 + (generation_config.prompt_lookup_num_tokens or 0)
        if cache.max_length is None:
            cache.max_length = max_cache_length
        elif max_cache_length > cache.max_length:
            raise ValueError(
                f"this may need {max_cache_length} positions, and the session has room for {cache.max_length}: "
                "generate fewer tokens, or open the session with a greater max_length"
            )
        cache.beams = generation_config.num_beams or 1
        rows = batch_size * max(cache.beams, generation_config.num_return_sequences or 1)
        if cache.left_padding is not None and len(cache.left_padding) != rows:
            cache.reset()

    # Our own

    def _cache(self, max_length: int | None, *, remember: bool = False) -> SwarmCache:
        connection, adapter = self._connection, self.active_adapter
        return SwarmCache(
            lambda length: connection.session(max_length=length, adapter=adapter), max_length, remember=remember
        )

    @staticmethod
    def _resume(cache: SwarmCache, inputs: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Make the cache hold nothing but a beginning of what is about to be passed."""
        ids = kwargs.get("inputs", kwargs.get("input_ids")) if inputs is None else inputs
        mask = kwargs.get("attention_mask")
        cache.only_new_ids = False
        if kwargs.get("inputs_embeds") is not None or ids is None:
            cache.reset()  # embeddings can't be compared with what was seen
        elif mask is not None and mask.shape[-1] > ids.shape[-1]:
            if mask.shape[-1] != cache.get_seq_length() + ids.shape[-1]:
                raise ValueError(
                    f"attention_mask has {mask.shape[-1]} columns, but {cache.get_seq_length()} are done and "
                    f"{ids.shape[-1]} are new. Simplest is to pass all ids so far, and a mask of the same shape"
                )
            cache.only_new_ids = True
        else:
            cache.resume(ids, mask)


def _close_collected(connection: SwarmConnection) -> None:
    """For a model that nobody closed. The collector may run in any thread, in the event loop's too, which can't wait
    for itself; the main thread always may, and at exit it is the only one that is sure to go on."""
    if threading.current_thread() is threading.main_thread():
        connection.close()
    else:
        threading.Thread(target=connection.close, name="swarm-close", daemon=True).start()


def _dtype_named(dtype: str | torch.dtype) -> str | torch.dtype:
    """``"bfloat16"`` as torch's; ``"auto"`` as what ``load_ends`` calls it."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return "checkpoint"
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"dtype is 'auto', 'float32', 'bfloat16' or 'float16', not {dtype!r}")
    return found


@functools.cache
def _facade_class(facade: type[SwarmModelForCausalLM], family: type[PreTrainedModel]) -> type:
    """``family`` with ``facade`` before it. It keeps the family's name, which ``save_pretrained`` writes down."""
    qualified = f"{facade.__qualname__}[{family.__name__}]"
    return type(family.__name__, (facade, family), {"__module__": facade.__module__, "__qualname__": qualified})
