// The choice of experts by logits of ELEMENT [T, X], its gradient, and the order of the rows that experts read.
//
// Scores are a softmax over a token's logits, or with SIGMOID = 1 the sigmoid of each. Of equal keys the first is chosen; what
// is not a number counts as the lowest. X <= 1024, k <= 32; the pairs of a token and its k experts are numbered token times k
// plus choice. Every order of sums is fixed, and the sort keeps the order of an expert's tokens.
//
// choose_experts           grid T, group 32: weights f32 [T, k] and chosen u32 [T, k], the best first. `groups` > 0: only experts
//                          of the `open_groups` groups with the largest sums of two. `by_scores`: scores are compared, plus
//                          `correction` f32 [X] if `corrected`; else logits are
// choose_experts_backward  grid T, group 32: d_logits [T, X] of d_weights (if `weighted`) and of the balance (if `balanced`),
//                          times `factor` f32 [1]
// rank_pairs               grid parts, group 512: ranks u32 [P] of each pair among the part's of its expert, counts u32 [parts, X]
// sum_counts               one group of at least X: counts become what is before each part; offsets u32 [X + 1]; tiles u32
//                          [tiles, 3]: expert, first row, rows
// place_pairs              grid parts, group 512: places u32 [P] of pairs, order u32 [P] of rows
// balance_rows             grid T, group 32: rows [2 X + 1] of f32: probabilities by softmax, choices and 1, times the mask
// balance_loss             one group of 32: X sum_e probability_e chosen_e / tokens^2 of the sums over such rows
// Bytes: the logits once or twice; 4 P each for what is an index.

#define MOST_EXPERTS 1024

#ifndef SIGMOID
#define SIGMOID 0
#endif

// Scores of a row by softmax; those of experts that this lane owns: every 32nd.
DEVICE void softmax_row(
    POSITION const GLOBAL ELEMENT* logits, uint experts, SHARED_POINTER(float) scores) {
    float top = -INFINITE;
    for (uint i = THREAD; i < experts; i += 32) top = maximum(top, widen(logits[i]));
    top = simd_max(top);
    float sum = 0.0f;
    for (uint i = THREAD; i < experts; i += 32) {
        scores[i] = exponential(widen(logits[i]) - top);
        sum += scores[i];
    }
    sum = simd_sum(sum);
    for (uint i = THREAD; i < experts; i += 32) scores[i] /= sum;
}

DEVICE void score_row(POSITION const GLOBAL ELEMENT* logits, uint experts, SHARED_POINTER(float) scores) {
#if SIGMOID
    for (uint i = THREAD; i < experts; i += 32) scores[i] = 1.0f / (1.0f + exponential(-widen(logits[i])));
#else
    softmax_row(HERE logits, experts, scores);
#endif
}

DEVICE float as_key(float x) { return x == x ? x : -INFINITE; }

// The index of the largest value that was not taken; a lane remembers which of its own were. All lanes get it.
DEVICE uint take_best(POSITION SHARED_POINTER(float) values, uint count, LOCAL uint& taken) {
    float key = -INFINITE, index = (float)MOST_EXPERTS;
    for (uint i = THREAD; i < count; i += 32) {
        if (taken >> (i / 32) & 1) continue;
        if (index == (float)MOST_EXPERTS || values[i] > key) {
            key = values[i];
            index = (float)i;
        }
    }
    for (uint mask = 16; mask > 0; mask >>= 1) {
        float other = simd_shuffle_xor(key, mask), place = simd_shuffle_xor(index, mask);
        if (other > key || (other == key && place < index)) {
            key = other;
            index = place;
        }
    }
    uint best = (uint)index;
    if (best % 32 == THREAD) taken |= 1u << (best / 32);
    return best;
}

// Keys outside of the groups with the largest sums of two become the lowest.
DEVICE void close_groups(
    POSITION SHARED_POINTER(float) keys, uint experts, uint groups, uint open_groups, SHARED_POINTER(float) sums,
    SHARED_POINTER(uint) open) {
    uint width = experts / groups;
    BARRIER();
    for (uint group = THREAD; group < groups; group += 32) {
        float first = -INFINITE, second = -INFINITE;
        for (uint i = group * width; i < (group + 1) * width; ++i) {
            float key = keys[i];
            if (key > first) {
                second = first;
                first = key;
            } else if (key > second) {
                second = key;
            }
        }
        sums[group] = as_key(first + second);
        open[group] = 0;
    }
    BARRIER();
    uint taken = 0;
    for (uint i = 0; i < open_groups; ++i) {
        uint group = take_best(HERE sums, groups, taken);
        if (THREAD == 0) open[group] = 1;
    }
    BARRIER();
    for (uint i = THREAD; i < experts; i += 32)
        if (!open[i / width]) keys[i] = -INFINITE;
}

KERNEL(choose_experts)(GIVEN_POSITION
    const GLOBAL ELEMENT* logits, const GLOBAL float* correction, GLOBAL float* weights, GLOBAL uint* chosen,
    SCALAR(uint, experts), SCALAR(uint, pitch), SCALAR(uint, choices), SCALAR(uint, groups), SCALAR(uint, open_groups),
    SCALAR(uint, by_scores), SCALAR(uint, corrected), SCALAR(uint, normalised), SCALAR(float, epsilon), SCALAR(float, scale)) {
    SHARED float scores[MOST_EXPERTS];
    SHARED float keys[MOST_EXPERTS];
    SHARED float sums[MOST_EXPERTS / 2];
    SHARED uint open[MOST_EXPERTS / 2];
    ulong64 token = GROUP_X;
    logits += token * pitch;
    score_row(HERE logits, experts, scores);
    for (uint i = THREAD; i < experts; i += 32) {
        float key = by_scores ? scores[i] : widen(logits[i]);
        if (corrected) key += correction[i];
        keys[i] = as_key(key);
    }
    if (groups > 0) close_groups(HERE keys, experts, groups, open_groups, sums, open);
    uint taken = 0, own = 0;
    for (uint choice = 0; choice < choices; ++choice) {
        uint best = take_best(HERE keys, experts, taken);
        if (THREAD == choice) own = best;
    }
    BARRIER();
    float score = THREAD < choices ? scores[own] : 0.0f;
    float sum = simd_sum(score);
    if (THREAD >= choices) return;
    if (normalised) score /= sum + epsilon;
    weights[token * choices + THREAD] = score * scale;
    chosen[token * choices + THREAD] = own;
}

KERNEL(choose_experts_backward)(GIVEN_POSITION
    const GLOBAL ELEMENT* logits, const GLOBAL uint* chosen, const GLOBAL float* d_weights, const GLOBAL float* balance,
    const GLOBAL float* mask, const GLOBAL float* factor, GLOBAL ELEMENT* d_logits, SCALAR(uint, experts),
    SCALAR(uint, pitch), SCALAR(uint, d_pitch), SCALAR(uint, choices), SCALAR(uint, normalised), SCALAR(float, epsilon),
    SCALAR(float, scale), SCALAR(uint, weighted), SCALAR(uint, balanced), SCALAR(uint, masked)) {
    SHARED float scores[MOST_EXPERTS];
    SHARED float slopes[MOST_EXPERTS];
    ulong64 token = GROUP_X;
    logits += token * pitch;
    d_logits += token * d_pitch;
    score_row(HERE logits, experts, scores);
    float tokens = balanced ? balance[2 * experts] : 0.0f;
    float each = tokens > 0.0f ? factor[0] * (float)experts / (tokens * tokens) : 0.0f;
    if (masked) each *= mask[token];
    for (uint i = THREAD; i < experts; i += 32) slopes[i] = balanced ? each * balance[experts + i] : 0.0f;
    BARRIER();
    if (weighted) {
        bool is_choice = THREAD < choices;
        uint expert = is_choice ? chosen[token * choices + THREAD] : 0;
        float score = is_choice ? scores[expert] : 0.0f, d = is_choice ? d_weights[token * choices + THREAD] : 0.0f;
        if (normalised) {
            float divisor = simd_sum(score) + epsilon;
            d = (d - simd_sum(score * d) / divisor) / divisor;
        }
        if (is_choice) slopes[expert] += scale * d;
        BARRIER();
    }
#if SIGMOID
    for (uint i = THREAD; i < experts; i += 32) narrow(slopes[i] * scores[i] * (1.0f - scores[i]), d_logits + i);
#else
    float mean = 0.0f;
    for (uint i = THREAD; i < experts; i += 32) mean += scores[i] * slopes[i];
    mean = simd_sum(mean);
    for (uint i = THREAD; i < experts; i += 32) narrow(scores[i] * (slopes[i] - mean), d_logits + i);
#endif
}

#define PART 512

KERNEL(rank_pairs)(GIVEN_POSITION
    const GLOBAL uint* chosen, GLOBAL uint* ranks, GLOBAL uint* counts, SCALAR(uint, pairs), SCALAR(uint, experts)) {
    SHARED uint of_part[PART];
    uint pair = GROUP_X * PART + THREAD;
    uint own = pair < pairs ? chosen[pair] : experts;
    of_part[THREAD] = own;
    counts += (ulong64)GROUP_X * experts;
    for (uint i = THREAD; i < experts; i += PART) counts[i] = 0;
    BARRIER();
    uint before = 0, after = 0;
    for (uint i = 0; i < PART; ++i) {
        uint same = of_part[i] == own ? 1 : 0;
        before += i < THREAD ? same : 0;
        after += i > THREAD ? same : 0;
    }
    if (pair >= pairs) return;
    ranks[pair] = before;
    if (after == 0) counts[own] = before + 1;
}

KERNEL(sum_counts)(GIVEN_POSITION
    GLOBAL uint* counts, GLOBAL uint* offsets, GLOBAL uint* tiles, SCALAR(uint, parts), SCALAR(uint, experts),
    SCALAR(uint, pairs), SCALAR(uint, tile_rows), SCALAR(uint, tile_count)) {
    SHARED uint row_ends[MOST_EXPERTS];
    SHARED uint tile_ends[MOST_EXPERTS];
    uint own = 0;
    for (uint part = 0; part < parts && THREAD < experts; ++part) {
        uint count = counts[(ulong64)part * experts + THREAD];
        counts[(ulong64)part * experts + THREAD] = own;
        own += count;
    }
    uint own_tiles = (own + tile_rows - 1) / tile_rows, rows = own, last = own_tiles;
    row_ends[THREAD] = rows;
    tile_ends[THREAD] = last;
    BARRIER();
    for (uint step = 1; step < THREADS; step *= 2) {
        if (THREAD >= step) {
            rows += row_ends[THREAD - step];
            last += tile_ends[THREAD - step];
        }
        BARRIER();
        row_ends[THREAD] = rows;
        tile_ends[THREAD] = last;
        BARRIER();
    }
    if (THREAD < experts) offsets[THREAD] = rows - own;
    if (THREAD == 0) offsets[experts] = pairs;
    for (uint i = 0; i < own_tiles; ++i) {
        GLOBAL uint* tile = tiles + 3 * (last - own_tiles + i);
        uint first = i * tile_rows;
        tile[0] = THREAD;
        tile[1] = rows - own + first;
        tile[2] = own - first < tile_rows ? own - first : tile_rows;
    }
    for (uint i = tile_ends[THREADS - 1] + THREAD; i < tile_count; i += THREADS) {
        tiles[3 * i] = 0;
        tiles[3 * i + 1] = 0;
        tiles[3 * i + 2] = 0;
    }
}

KERNEL(place_pairs)(GIVEN_POSITION
    const GLOBAL uint* chosen, const GLOBAL uint* ranks, const GLOBAL uint* counts, const GLOBAL uint* offsets,
    GLOBAL uint* places, GLOBAL uint* order, SCALAR(uint, pairs), SCALAR(uint, experts)) {
    uint pair = GROUP_X * PART + THREAD;
    if (pair >= pairs) return;
    uint expert = chosen[pair];
    uint row = offsets[expert] + counts[(ulong64)GROUP_X * experts + expert] + ranks[pair];
    places[pair] = row;
    order[row] = pair;
}

KERNEL(balance_rows)(GIVEN_POSITION
    const GLOBAL ELEMENT* logits, const GLOBAL uint* chosen, const GLOBAL float* mask, GLOBAL float* rows,
    SCALAR(uint, experts), SCALAR(uint, pitch), SCALAR(uint, choices), SCALAR(uint, masked)) {
    SHARED float scores[MOST_EXPERTS];
    ulong64 token = GROUP_X;
    rows += token * (2 * experts + 1);
    float factor = masked ? mask[token] : 1.0f;
    softmax_row(HERE logits + token * pitch, experts, scores);
    for (uint i = THREAD; i < experts; i += 32) {
        rows[i] = factor * scores[i];
        rows[experts + i] = 0.0f;
    }
    BARRIER();
    if (THREAD < choices) rows[experts + chosen[token * choices + THREAD]] = factor;
    if (THREAD == 0) rows[2 * experts] = factor;
}

KERNEL(balance_loss)(GIVEN_POSITION const GLOBAL float* sums, GLOBAL float* loss, SCALAR(uint, experts)) {
    float tokens = sums[2 * experts], sum = 0.0f;
    for (uint i = THREAD; i < experts; i += 32) sum += sums[i] / tokens * (sums[experts + i] / tokens);
    sum = simd_sum(sum);
    if (THREAD == 0) loss[0] = tokens > 0.0f ? (float)experts * sum : 0.0f;
}
