"""Native control plane: page pool, segment tree and prefix index.

`dendrite_engine.cache.reference` is the pure-Python twin with the same API; `dendrite_engine.cache`
picks one. Array arguments may be anything that numpy turns into a 1-d array of the right kind;
arrays of exactly the type given here pass without a copy. Returned arrays belong to the caller.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Int32Array: TypeAlias = npt.NDArray[np.int32]
Float32Array: TypeAlias = npt.NDArray[np.float32]
UInt8Array: TypeAlias = npt.NDArray[np.uint8]
IntegerArray: TypeAlias = npt.NDArray[np.integer[Any]] | Sequence[int]
FloatArray: TypeAlias = npt.NDArray[np.floating[Any]] | Sequence[float]

class Plan:
    """What one forward pass computes: int32 numpy views, which keep the plan alive.

    Rows are tokens in depth-first order of the segment tree, so the rows below a segment are one
    interval. Close it with `commit` or `cancel`; a plan that is dropped is cancelled.
    """

    @property
    def token_ids(self) -> Int32Array:
        """[T] token of each row."""
    @property
    def positions(self) -> Int32Array:
        """[T] position of each row."""
    @property
    def slots(self) -> Int32Array:
        """[T] page * page_size + offset where K and V go; -1 = computed already, do not store."""
    @property
    def copies(self) -> Int32Array:
        """[C, 3] (source page, target page, slots): run before K and V of this step are stored."""
    @property
    def logits_row(self) -> Int32Array:
        """[n] row whose logits are the requested branch's next-token logits; -1 = not finished."""
    @property
    def item_indptr(self) -> Int32Array:
        """[items + 1] rows of each item, an item being one segment's run of tokens."""
    @property
    def node_pos(self) -> Int32Array:
        """[N] position of the first slot of an attention node, a multiple of page_size."""
    @property
    def node_len(self) -> Int32Array:
        """[N] tokens of the node; slot j of its page k is position node_pos + k * page_size + j."""
    @property
    def node_row_begin(self) -> Int32Array:
        """[N] first row that reads the node."""
    @property
    def node_row_end(self) -> Int32Array:
        """[N] row after the last one that reads the node; row r reads positions <= positions[r].

        For every row its nodes come in order of position and tile 0 .. positions[r].
        """
    @property
    def node_page_indptr(self) -> Int32Array:
        """[N + 1] each node's part of `page_indices`."""
    @property
    def page_indices(self) -> Int32Array:
        """Page ids of all nodes."""
    @property
    def num_tokens(self) -> int:
        """Rows (T)."""
    @property
    def num_items(self) -> int:
        """Items."""
    @property
    def num_nodes(self) -> int:
        """Attention nodes (N)."""
    def commit(self) -> None:
        """Mark the planned tokens as computed, except those dropped since the plan was made.

        Frees the sources of its copies and puts pages that became full into the prefix index.

        Raises:
            InvalidArgument: the plan is closed already.
        """
    def cancel(self) -> None:
        """Forget the plan: nothing counts as computed. No effect on a closed plan."""

class TreeCore:
    """Pages, segments and branch handles of one engine. Thread-safe.

    A branch handle is an int that is never used twice. A call that raises has changed nothing.
    All methods raise StaleBranch for a dead or unknown handle and InvalidArgument for a bad
    argument, each naming it and the numbers.
    """

    def __init__(
        self, num_pages: int, page_size: int = 16, prefix_cache: bool = True, debug: bool = False
    ) -> None:
        """Make an empty tree over `num_pages` pages of `page_size` tokens (power of two <= 256)."""
    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
    @property
    def page_size(self) -> int:
        """Tokens in a page."""
    def create(self, tokens: IntegerArray, namespace: str = "") -> tuple[int, int]:
        """Make a branch of `tokens` (int32[n], n >= 1); returns (handle, cached tokens).

        The longest cached prefix of whole pages of the namespace is reused, at most n - 1 tokens.
        Pages for the rest are taken at once and stay cached after the branch is gone. O(n).

        Raises:
            EmptyPrompt: no tokens.
            OutOfPages: the pages can't be had even by evicting.
        """
    def fork(self, branch: int) -> int:
        """Return a second handle to the same tokens. O(1) for any context; takes no page."""
    def fork_many(self, branch: int, n: int) -> list[int]:
        """Return `n` (1 .. 2**20) new handles to the same tokens. O(n); takes no page."""
    def fork_at(self, branch: int, position: int) -> int:
        """Return a handle to the first `position` tokens (1 <= position <= num_tokens).

        Cuts a segment when the position is inside one: O(tokens behind the cut), no K/V copied.
        """
    def append(
        self,
        branch: int,
        tokens: IntegerArray,
        logprobs: FloatArray | None = None,
        retain: bool = False,
    ) -> None:
        """Add token ids (int32[n]) and logprobs (float32[n], NaN = none) to one branch.

        Tokens go into the last page when nobody else holds it, else into a fresh page whose first
        slots are copied by the next plan (copy-on-write). `retain` keeps the full pages cached
        after the branch is gone. Amortised O(n).

        Raises:
            OutOfPages: the pages can't be had even by evicting.
        """
    def append_batch(
        self,
        branches: IntegerArray,
        tokens: IntegerArray,
        logprobs: FloatArray | None = None,
        expected: IntegerArray | None = None,
    ) -> UInt8Array:
        """Add one token to each branch; returns status [n]: 0 done, 1 out of pages, 2 stale, 3
        changed.

        branches int64[n], tokens int32[n], logprobs float32[n], expected int32[n]. A row that fails
        changes nothing and does not stop the rows after it. Changed: the branch does not hold the
        expected number of tokens, so the token was chosen for another text. Check and append are
        one: no other thread gets in between.
        """
    def rollback(self, branch: int, n: int) -> int:
        """Drop the last `n` tokens (1 <= n < num_tokens) of this branch; returns pages released.

        Other branches that share the tokens keep them. O(tokens dropped).
        """
    def prune(self, branch: int) -> int:
        """End a branch; returns the pages released: no longer live, so free or cached.

        O(pages released).
        """
    def draft(self, branch: int, tokens: IntegerArray) -> int:
        """Return a handle to the branch's tokens with guesses (int32[n], n >= 1) behind them.

        The branch's last token and the guesses are computed in pages of the draft's own, so one
        pass computes all of them, and the branch itself never holds a guess. `adopt` makes the
        good ones the branch's, `prune` ends the draft. Drafts count neither as branches nor as
        forks. O(n).

        Raises:
            InvalidArgument: no guesses, or the branch holds a single token.
            OutOfPages: the pages can't be had even by evicting.
        """
    def adopt(self, branch: int, draft: int, keep: int, logprobs: FloatArray, expected: int) -> int:
        """Make a branch hold the first `keep` tokens of a draft, and end the draft.

        logprobs (float32[n], n <= keep) are those of the last n tokens kept. Returns 0 done, 2 the
        branch is stale, 3 it does not hold the `expected` number of tokens; where it is not 0,
        nothing changed and the draft is still there. Other branches that share tokens with either
        keep them. O(tokens dropped).

        Raises:
            InvalidArgument: `draft` is a branch, or `keep` is out of range.
        """
    def num_tokens(self, branch: int) -> int:
        """Return the number of tokens. O(1)."""
    def num_computed(self, branch: int) -> int:
        """Return the number of tokens, from the first one on, whose K and V are in pages."""
    def tokens(self, branch: int, start: int = 0) -> Int32Array:
        """Return the token ids from position `start` (0 .. num_tokens) on."""
    def set_logprobs(self, branch: int, start: int, logprobs: FloatArray) -> None:
        """Write the logprobs (float32[n]) of n tokens from `start` on: those of tokens that were
        appended before they were known. Branches that share the tokens share them.
        """

    def logprobs(self, branch: int, start: int = 0) -> Float32Array:
        """Return the logprobs from position `start` on; NaN where none was given."""
    def pending(self, branches: IntegerArray) -> Int32Array:
        """Return num_tokens - num_computed [n]; -1 for a stale handle (it does not raise)."""
    def plan(self, branches: IntegerArray, quotas: IntegerArray) -> Plan:
        """Plan one forward pass: branches int64[n], quotas int32[n] (>= 1).

        For each branch: up to its quota of tokens of the first segment of its chain that is not
        computed; tokens shared by several branches come once, with the largest quota. A branch
        with nothing to compute gets its last token again, to read the logits.
        O(segments above the branches + rows + pages read).
        """
    def page_tables(self, branches: IntegerArray) -> tuple[Int32Array, Int32Array, Int32Array]:
        """Return (indptr [n+1], indices, last_page_len [n]) in the FlashInfer convention.

        Covers num_tokens; last_page_len is 1 .. page_size.
        """
    def describe(self, branches: IntegerArray) -> dict[str, Int32Array]:
        """Return columns [n] by name; -1 in all of them for a stale handle (it does not raise).

        num_tokens, num_computed, pages, owned_pages (released if pruned now), tail_refs, segments.
        O(segments + owned pages) a branch.
        """
    def segments(self, branch: int) -> list[tuple[int, int, int, int, list[int]]]:
        """Return (segment_id, start, length, refs, pages) of the branch's chain, root first."""
    def page_refs(self) -> Int32Array:
        """Return the references to each page [num_pages]."""
    def page_state(self) -> UInt8Array:
        """Return the state of each page [num_pages]: 0 free, 1 live, 2 cached."""
    def evict(self, n: int) -> int:
        """Free up to `n` cached pages, least recently used first, leaves before their parents.

        Returns how many. A live page is never taken.
        """
    def match_prefix(self, tokens: IntegerArray, namespace: str = "") -> int:
        """Return how many tokens `create` would find in the cache now. No side effect."""
    def stats(self) -> dict[str, int]:
        """Return counters and gauges by name. O(segments + pages).

        pages_total, pages_free, pages_live, pages_shared (live, more than one branch below),
        pages_cached, branches, segments, forks, prunes, rollbacks, cow_copies, evictions,
        prefix_hits, prefix_hit_tokens, pages_taken.
        """
    def refcount_histogram(self) -> dict[int, int]:
        """Return the number of live pages by the number of branches below them."""
    def check_integrity(self) -> None:
        """Recount everything from the handles.

        Raises:
            IntegrityError: the first book that the recount contradicts.
        """
    def dump(self) -> dict[str, Any]:
        """Return the whole state in canonical form, equal in both implementations. For tests."""
    def debug_events(self) -> tuple[list[int], list[int], list[int]]:
        """Return pages (taken, freed, sealed) since the last call; needs debug=True.

        Sealed: every slot is computed; the page is not written again unless it is freed or comes
        up in `debug_unsealed`.
        """
    def debug_unsealed(self) -> list[int]:
        """Return sealed pages that are rewritten after a rollback, since the last call."""

def attention_reads(
    node_row_begin: IntegerArray,
    node_row_end: IntegerArray,
    node_page_indptr: IntegerArray,
    rows_per_block: int,
) -> int:
    """Pages that blocks of so many rows read, summed over the blocks; O(nodes)."""

def attention_work(
    positions: IntegerArray,
    node_pos: IntegerArray,
    node_len: IntegerArray,
    node_row_begin: IntegerArray,
    node_row_end: IntegerArray,
    node_page_indptr: IntegerArray,
    page_indices: IntegerArray,
    rows: int,
    page_size: int,
    group: int,
    q_tile: int,
    workers: int,
    window: int,
    deterministic: bool,
    out: Int32Array,
) -> tuple[int, int, int]:
    """Cut the attention nodes of a plan into a work list for the GPU kernels.

    Args:
        positions, node_pos, node_len, node_row_begin, node_row_end, node_page_indptr, page_indices:
            arrays of the plan.
        rows: rows of the batch, padding included.
        page_size: slots of a page.
        group: query heads of a kv head.
        q_tile: queries of a block.
        workers: for each kv head; see the op tree_attention_workers.
        window: sliding window, 0 for none.
        deterministic: cut at fixed positions, so that a row's result depends on its own pages only.
        out: int32, written when the list fits.

    Returns:
        (ints needed, slots for partial results, blocks of rows). O(rows + entries).
    """
