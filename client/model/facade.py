"""The model facade: a transformers model whose blocks are computed by a swarm."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from swarm.compat.generation import GenerateHooks
from swarm.compat.keywords import GENERATE_KEYWORD, OLDEST_KEYWORD, ModelOutput, given_cache, take_cache, with_cache
from swarm.network.forks import refuse_fork

from ..ends.cache import SwarmCache
from ..ends.ends import put_blocks_in
from ..ends.generating import Generation, open_cache
from ..ends.head import combine_head
from ..ends.remote_blocks import RemoteBlocks
from .arguments import device_of, dtype_of, key_of, peers_of, settings_of
from .generation import choose_cache, limit_candidates, refuse_unserved, resume
from .model_session import ModelSession, open_cache_of
from .streaming import stream_tokens

if TYPE_CHECKING:
    from swarm.compat.generation import BaseStreamer, GenerateRequest
    from swarm.model.model_source import ModelSource

    from ..session.hop import Hop
    from ..session.swarm_connection import SwarmConnection
    from ..settings import ClientSettings

# The facade is always mixed into some family's ForCausalLM class. That is only known when it is made, so to type
# checkers what is inherited is Any.
_Family: Any = object


class SwarmModelForCausalLM(GenerateHooks, _Family):
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
        model: str | os.PathLike[str],
        *,
        initial_peers: str | Sequence[str] = (),
        lan: bool | str = False,
        swarm_key: Any = None,
        join: str | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
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
            initial_peers: multiaddresses of nodes that are in the swarm, or one.
            lan: instead of them, to find the swarm on the local network: ``True``, or its name.
            swarm_key: of a locked swarm: the key's file, or the key itself (better from a variable than in a program).
            join: an invitation instead of them, as ``swarm-node invite`` prints it.
            dtype: of the ends: ``"auto"``, the default, for the checkpoint's own, else a torch dtype or its name.
            torch_dtype: its old name.
            device_map: where the ends go: a device, ``{"": device}``, or ``"auto"``. Default: the CPU.
            revision, token, cache_dir: as in transformers.
            dht_prefix: the model's name in the swarm, if it isn't the usual one.
            weights: where the ends come from: ``"hub"`` (a directory, or else the Hub), ``"peers"`` (nodes that hand
                weights out), or ``"auto"`` (a directory, else peers, else the Hub).
            manifest: the root of the manifest that weights from peers must have, as ``swarm-node seed`` prints it.
            **settings: fields of :class:`swarm.client.ClientSettings`.

        Raises:
            ModelError: the model can't be found or used, or the versions of transformers and torch that are installed
                aren't tested and compute models of its type wrong.
            ConnectError: none of ``initial_peers`` answers, or no swarm is found on the local network.
            LockedError: the swarm has a key, and it isn't the one that is given.
            UsageError: an argument can't be, or the process was forked from one that is in a swarm.
            TypeError: an argument isn't known.
        """
        from .find_model import find_model
        from .find_swarm import find_swarm

        refuse_fork()
        chosen, ends_dtype, device = settings_of(settings), dtype_of(dtype, torch_dtype), device_of(device_map)
        peers = find_swarm(peers_of(initial_peers), lan, [os.fspath(model)], dht_prefix, key_of(swarm_key, join))
        source = find_model(
            os.fspath(model),
            peers,
            weights=weights,
            manifest=manifest,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            dht_prefix=dht_prefix,
            startup_timeout=chosen.startup_timeout,
        )
        return cls._join(source, peers, chosen, ends_dtype, device)

    @classmethod
    def _join(
        cls,
        source: ModelSource,
        peers: tuple[str, ...],
        settings: ClientSettings,
        dtype: str | torch.dtype,
        device: torch.device,
    ) -> SwarmModelForCausalLM:
        from swarm.model.load_ends import load_ends

        from ..session.swarm_connection import SwarmConnection
        from .family_check import require_right_ends

        require_right_ends(source.model_type, SwarmModelForCausalLM.from_ends)
        # Before the weights: whether the swarm answers is known in a moment, a download can take minutes.
        connection = SwarmConnection.open(source, peers, settings)
        try:
            ends = load_ends(source, dtype=dtype).to(device)  # type: ignore[arg-type]
            return cls.from_ends(ends, connection, deterministic=settings.deterministic)
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
        # in place: a model of the new class would have to be built and filled once more
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
        return ModelSession(self, open_cache(self._connection, max_length, remember=True), max_length)

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
            As there. The cache in a returned dict is None unless a session was given, since the one for just this
            call is closed.

        Raises:
            ValueError: padding that isn't on the left, or more tokens than the session has room for.
            MissingBlocksError: nobody serves some of the model's blocks.
        """
        refuse_fork()
        self._refuse_call(kwargs)
        named = None if session is None else session.cache
        cache, handed_on = choose_cache(named, open_cache_of(self), given_cache(kwargs))
        owned = cache is None
        if cache is None:
            cache = open_cache(self._connection, None)
        elif not handed_on:
            config = args[0] if args else kwargs.get("generation_config")
            resume(cache, inputs, config or self.generation_config, kwargs)
        try:
            with Generation(cache):
                result = super().generate(inputs, *args, **with_cache(kwargs, cache, GENERATE_KEYWORD))
        finally:
            if owned:
                cache.close()
            self._last_route = cache.route
        if owned and isinstance(result, ModelOutput):
            take_cache(result)
        return result

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching is the nodes' work: call generate() from several threads, and they batch what comes"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    # Where transformers' generate() asks the model

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        cache = given_cache(kwargs)
        # Assisted generation feeds the whole prompt at first, whatever the cache holds already.
        if (
            isinstance(cache, SwarmCache)
            and next_sequence_length is None
            and is_first_iteration
            and inputs_embeds is None
            and not cache.only_new_ids
            and 0 < cache.get_seq_length() < input_ids.shape[1]
        ):
            next_sequence_length = input_ids.shape[1] - cache.get_seq_length()
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if isinstance(cache, SwarmCache):
            given = prepared.get("inputs_embeds")
            cache.prepare((prepared["input_ids"] if given is None else given).shape[1])
            # Under the name that PEFT looks for, whatever transformers calls it; our model takes any.
            prepared = with_cache(prepared, cache, OLDEST_KEYWORD)
        return prepared

    def begin_generation(self, request: GenerateRequest) -> bool:
        """See :class:`GenerateHooks`."""
        refuse_unserved(request.config, request.mode, self.generation_config)
        if request.config.use_cache is False:
            return False
        cache: SwarmCache = request.cache
        cache.need(request.columns)
        cache.beams = request.config.num_beams or 1
        if cache.left_padding is not None and len(cache.left_padding) != request.rows:
            cache.reset()
        return True

    def adapt_candidates(self, generator: Any, config: GenerationConfig) -> None:
        """See :class:`GenerateHooks`."""
        limit_candidates(generator, config.max_length - 1)  # the model adds one

    # Our own

    def _refuse_call(self, kwargs: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: an argument of ``generate()`` can't be had, and would lead elsewhere than to the checks there.
        """
        given = given_cache(kwargs)
        if given is not None and not isinstance(given, SwarmCache):
            raise ValueError(f"the cache has to be a session's (session.cache), not {type(given).__name__}")
        if kwargs.get("cache_implementation") == "paged":
            self.generate_batch()
        if kwargs.get("synced_gpus"):
            raise ValueError("synced_gpus is for a model that torch.distributed has cut up, which the two ends are not")


def _close_collected(connection: SwarmConnection) -> None:
    """For a model that nobody closed. The collector may run in any thread, in the event loop's too, which can't wait
    for itself; the main thread always may, and at exit it is the only one that is sure to go on."""
    if threading.current_thread() is threading.main_thread():
        connection.close()
    else:
        threading.Thread(target=connection.close, name="swarm-close", daemon=True).start()


@functools.cache
def _facade_class(facade: type[SwarmModelForCausalLM], family: type[PreTrainedModel]) -> type:
    """``family`` with ``facade`` before it. It keeps the family's name, which ``save_pretrained`` writes down."""
    qualified = f"{facade.__qualname__}[{family.__name__}]"
    return type(family.__name__, (facade, family), {"__module__": facade.__module__, "__qualname__": qualified})
