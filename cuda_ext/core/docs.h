// Docstrings of dendrite_engine._core; _core.pyi carries the same text with types.
#pragma once

namespace dendrite::docs {

inline constexpr const char* kModule =
    "Native control plane: page pool, segment tree and prefix index (see dendrite_engine.cache).";
inline constexpr const char* kTreeCore =
    "Pages, segments and branch handles of one engine. Thread-safe.\n\n"
    "A branch handle is an int that is never reused. A call that raises has changed nothing.\n"
    "Errors: InvalidArgument for a bad argument, StaleBranch for a dead handle, OutOfPages.";
inline constexpr const char* kCreate =
    "Make a branch of `tokens` (int32[n], n >= 1); returns (handle, tokens found in the cache).\n\n"
    "The longest cached prefix of whole pages (at most n - 1 tokens) of the namespace is reused,\n"
    "pages for the rest are taken at once. Raises EmptyPrompt, OutOfPages. O(n).";
inline constexpr const char* kFork =
    "A second handle to the same tokens. O(1) whatever the context; takes no page.";
inline constexpr const char* kForkMany = "`n` new handles to the same tokens. O(n); takes no page.";
inline constexpr const char* kForkAt =
    "A handle to the first `position` tokens (1 <= position <= num_tokens).\n\n"
    "Cuts a segment when the position is inside one: O(tokens behind the cut), no K/V copied.";
inline constexpr const char* kAppend =
    "Add token ids (int32[n]) with optional logprobs (float32[n], NaN = none) to one branch.\n\n"
    "Takes the pages they need or raises OutOfPages. `retain` keeps full pages in the prefix\n"
    "index after the branch is gone. Amortised O(n).";
inline constexpr const char* kAppendBatch =
    "One token for each branch; returns uint8[n]: 0 done, 1 out of pages, 2 stale, 3 changed.\n\n"
    "A row that fails changes nothing and does not stop the others. Changed: the branch does not\n"
    "hold the expected number of tokens (int32[n]); no branch is checked without `expected`.";
inline constexpr const char* kRollback =
    "Drop the last `n` tokens of this branch (1 <= n < num_tokens); returns the pages released.\n\n"
    "Branches that share the tokens keep them. O(tokens dropped).";
inline constexpr const char* kPrune =
    "End a branch; returns the pages released (no longer live: free, or cached if retained).\n\n"
    "O(pages released).";
inline constexpr const char* kDraft =
    "A handle to the tokens of a branch (at least 2) with guessed `tokens` (int32[n], n >= 1) behind\n"
    "them. The branch's last token and the guesses are computed in pages of the draft's own, so one\n"
    "pass computes all of them and the branch never holds a guess. Raises OutOfPages. O(n).";
inline constexpr const char* kAdopt =
    "Make a branch hold the first `keep` tokens of a draft, and end the draft; returns 0 done,\n"
    "2 stale, 3 changed: the branch does not hold the `expected` number of tokens. Where it is not\n"
    "0, nothing changed. logprobs (float32[n]) are those of the last n tokens kept.";
inline constexpr const char* kNumTokens = "Tokens of the branch. O(1).";
inline constexpr const char* kNumComputed =
    "Tokens, from the first one on, whose K and V are in pages.";
inline constexpr const char* kTokens = "Token ids from `start` on, int32[num_tokens - start].";
inline constexpr const char* kLogprobs =
    "Logprobs from `start` on, float32[num_tokens - start], NaN where none was given.";
inline constexpr const char* kSetLogprobs =
    "Write the logprobs (float32[n]) of n tokens from `start` on: those of tokens that were appended\n"
    "before they were known. Branches that share the tokens share them.";
inline constexpr const char* kPending =
    "num_tokens - num_computed of each branch, int32[n]; -1 for a stale handle.";
inline constexpr const char* kPlan =
    "Plan one forward pass: for each branch up to quotas[i] (>= 1) tokens of its first segment\n"
    "that is not computed; a branch with nothing to compute gets its last token again.\n\n"
    "branches int64[n], quotas int32[n]. Raises StaleBranch, InvalidArgument.\n"
    "O(segments above the branches + rows + pages read).";
inline constexpr const char* kPageTables =
    "Flattened page tables (indptr int32[n+1], indices int32[], last_page_len int32[n]) in the\n"
    "FlashInfer convention, covering num_tokens; last_page_len is 1..page_size.";
inline constexpr const char* kDescribe =
    "Columns int32[n] by name: num_tokens, num_computed, pages, owned_pages (released if pruned\n"
    "now), tail_refs, segments. -1 for a stale handle. O(segments + owned pages) a branch.";
inline constexpr const char* kSegments =
    "Segments of the branch, root first: (segment_id, start, length, refs, pages).";
inline constexpr const char* kPageRefs = "References to each page, int32[num_pages].";
inline constexpr const char* kPageState =
    "State of each page, uint8[num_pages]: 0 free, 1 live, 2 cached (held by the index only).";
inline constexpr const char* kEvict =
    "Free up to `n` cached pages, least recently used first, leaves before what they hang below;\n"
    "returns how many. A live page is never taken.";
inline constexpr const char* kPeekFree =
    "The up to `n` free pages that will be taken next, in this order, i32. No side effect; whoever\n"
    "takes a page changes it. Cached pages are not among them.";
inline constexpr const char* kMatchPrefix =
    "Tokens of the prompt that `create` would find in the cache now. No side effect.";
inline constexpr const char* kStats = "Counters and gauges by name. O(segments + pages).";
inline constexpr const char* kHistogram =
    "Branches below a page -> number of live pages with that many. O(segments + pages).";
inline constexpr const char* kCheckIntegrity =
    "Recount every reference from the handles; raises IntegrityError on the first lie.";
inline constexpr const char* kDump =
    "The whole state in canonical form: equal for the native core and its Python twin after equal\n"
    "calls. For tests.";
inline constexpr const char* kDebugEvents =
    "Lists of pages (taken, freed, sealed) since the last call; needs debug=True.\n\n"
    "Sealed: every slot of the page is computed. A page reported in debug_unsealed is written\n"
    "again after a rollback.";
inline constexpr const char* kDebugUnsealed =
    "Sealed pages whose last slots are about to be rewritten, since the last call; needs\n"
    "debug=True.";
inline constexpr const char* kPlanClass =
    "What one forward pass computes; int32 numpy views, rows in depth-first order of the tree.\n\n"
    "Close it with commit() or cancel(); dropping it cancels it.";
inline constexpr const char* kCommit =
    "Mark the planned tokens as computed, except those dropped since. Raises InvalidArgument when\n"
    "the plan is closed.";
inline constexpr const char* kCancel = "Forget the plan; no effect when it is closed.";
inline constexpr const char* kAttentionWork =
    "Cut the attention nodes of a plan into a work list for the GPU kernels.\n\n"
    "`rows`: rows of the batch, padding included; q_tile: queries of a block; workers: for each\n"
    "kv head, see the op tree_attention_workers; deterministic: cut at fixed positions.\n"
    "Writes int32 into `out` when they fit, nothing otherwise. Returns (ints needed, slots for\n"
    "partial results, blocks of rows). Layout: cuda_ext/include/dendrite/attention_work.h.";
inline constexpr const char* kAttentionReads =
    "Pages that blocks of so many rows read, summed over the blocks.";

}  // namespace dendrite::docs
