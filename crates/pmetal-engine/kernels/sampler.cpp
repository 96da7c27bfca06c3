// Choosing the next token of a text from f32 logits [V], and moving the text's place on. The rules, which host and device
// follow to the bit, are stated in src/ops/sample.rs: scores are compared, weights are integers, sums have no order.
//
// counts [V] or null: bit 31 where the token is in the text, below it how often it was generated. drawn [1] counts draws.
//
// sample_scores  grid ceil(V / 2048), group 256: penalised scores f32 [V up to a multiple of 8, filled by minus infinity],
//                and for each group the best score and its first token; NaN where one is NaN
// sample_best    one group of 256: takes the best token
// sample_draw    one group of 1024: leaves the TOP_K best where it is not 0, of these the fewest that reach the share top_p
//                (in 2^-32) where HAS_TOP_P, of these those of at least least_weight; draws one by a word of the key
// Both move the place on: token [1], position [1] + 1, the row of caches [M] and the visible rows [2 M] of M kinds of masks with
// limits [2 M], the keys of a window and of a chunk (0 = none), and caches that begin at positions firsts [M], log [log_size] at
// drawn, counts, drawn + 1. Where no score is finite the log gets the largest number.
// Bytes: logits and scores a few times; nothing leaves the device.

#define UNFIT 0xffffffffu

struct Place {
    GLOBAL uint* token;
    GLOBAL uint* position;
    GLOBAL uint* rows;
    GLOBAL int* ranges;
    const GLOBAL uint* limits;
    const GLOBAL uint* firsts;
    GLOBAL uint* log;
    GLOBAL uint* counts;
    GLOBAL uint* drawn;
    uint kinds, log_size;
};

// Done by one thread.
DEVICE void move_on(Place place, uint chosen) {
    uint drawn = place.drawn[0], position = place.position[0] + 1;
    place.log[drawn % place.log_size] = chosen;
    uint token = chosen == UNFIT ? 0 : chosen;
    place.token[0] = token;
    place.position[0] = position;
    place.drawn[0] = drawn + 1;
    for (uint i = 0; i < place.kinds; ++i) {
        uint window = place.limits[2 * i], chunk = place.limits[2 * i + 1], end = position + 1;
        uint near = window > 0 && end > window ? end - window : 0, own = chunk > 0 ? position - position % chunk : 0;
        uint first = place.firsts[i];
        place.rows[i] = position - first;
        place.ranges[2 * i] = (int)((near > own ? near : own) - first);
        place.ranges[2 * i + 1] = (int)(end - first);
    }
    if (place.counts) place.counts[token] = (place.counts[token] + 1) | 0x80000000u;
}

DEVICE bool is_nan(float x) { return (as_bits(x) & 0x7fffffffu) > 0x7f800000u; }

// The better of two candidates, NaN above all; of equals the first token.
DEVICE bool is_better(float a, uint a_token, float b, uint b_token) {
    if (is_nan(a) || is_nan(b)) return is_nan(a) && !is_nan(b);
    return a > b || (a == b && a_token < b_token);
}

// Leaves the best of the group's candidates at the first place.
DEVICE void best_of_group(POSITION SHARED_POINTER(float) best, SHARED_POINTER(uint) tokens) {
    for (uint half_count = THREADS / 2; half_count > 0; half_count /= 2) {
        BARRIER();
        uint other = THREAD + half_count;
        if (THREAD < half_count && is_better(best[other], tokens[other], best[THREAD], tokens[THREAD])) {
            best[THREAD] = best[other];
            tokens[THREAD] = tokens[other];
        }
    }
    BARRIER();
}

KERNEL(sample_scores)(GIVEN_POSITION
    const GLOBAL float* logits, const GLOBAL uint* counts, GLOBAL float* scores, GLOBAL float* best_scores,
    GLOBAL uint* best_tokens, SCALAR(uint, vocabulary), SCALAR(float, repetition), SCALAR(float, presence),
    SCALAR(float, frequency)) {
    SHARED float best[256];
    SHARED uint tokens[256];
    float top = -INFINITE;
    uint top_token = UNFIT, padded = (vocabulary + 7) / 8 * 8;
    for (uint i = 0; i < 8; ++i) {
        uint token = GROUP_X * 2048 + i * THREADS + THREAD;
        if (token >= padded) continue;
        float score = token < vocabulary ? logits[token] : -INFINITE;
        uint count = counts && token < vocabulary ? counts[token] : 0;
        if (count > 0) score = score > 0.0f ? score / repetition : score * repetition;
        count &= 0x7fffffffu;
        if (count > 0) score -= presence;
        for (uint times = 0; times < count && frequency != 0.0f; ++times) score -= frequency;
        scores[token] = score;
        if (is_better(score, token, top, top_token)) {
            top = score;
            top_token = token;
        }
    }
    best[THREAD] = top;
    tokens[THREAD] = top_token;
    best_of_group(HERE best, tokens);
    if (THREAD == 0) {
        best_scores[GROUP_X] = best[0];
        best_tokens[GROUP_X] = tokens[0];
    }
}

// The best of all groups, at the first place of the shared arrays.
DEVICE void best_of_all(POSITION
    const GLOBAL float* best_scores, const GLOBAL uint* best_tokens, uint groups, SHARED_POINTER(float) best,
    SHARED_POINTER(uint) tokens) {
    float top = -INFINITE;
    uint top_token = UNFIT;
    for (uint i = THREAD; i < groups; i += THREADS) {
        if (!is_better(best_scores[i], best_tokens[i], top, top_token)) continue;
        top = best_scores[i];
        top_token = best_tokens[i];
    }
    best[THREAD] = top;
    tokens[THREAD] = top_token;
    best_of_group(HERE best, tokens);
}

KERNEL(sample_best)(GIVEN_POSITION
    const GLOBAL float* best_scores, const GLOBAL uint* best_tokens, GLOBAL uint* token, GLOBAL uint* position,
    GLOBAL uint* rows, GLOBAL int* ranges, const GLOBAL uint* limits, const GLOBAL uint* firsts, GLOBAL uint* log,
    GLOBAL uint* counts, GLOBAL uint* drawn, SCALAR(uint, groups), SCALAR(uint, kinds), SCALAR(uint, log_size)) {
    SHARED float best[256];
    SHARED uint tokens[256];
    best_of_all(HERE best_scores, best_tokens, groups, best, tokens);
    Place place = {token, position, rows, ranges, limits, firsts, log, counts, drawn, kinds, log_size};
    float top = best[0];
    if (THREAD == 0) move_on(place, is_nan(top) || top == INFINITE || top == -INFINITE ? UNFIT : tokens[0]);
}

// The scores f32 [padded] with the best of them.
struct Scores {
    const GLOBAL float* values;
    uint padded;
    float top, factor;
};

// How far a score is below the best, in 2^-24 of a factor of two.
DEVICE uint distance_of(float score, Scores all) {
    float t = (all.top - score) * all.factor;
    return t < 255.99998f ? (uint)(t * 16777216.0f) : 0xffffffffu;
}

// 2^(38 - distance / 2^24), in integers.
DEVICE ulong64 weight_of(uint distance) {
    uint whole = distance >> 24, part = distance << 8;
    if (whole > 38) return 0;
    // ln(2)^k / k! in 2^-32.
    uint sum = 437u;
    sum = 5676u - multiply_high(part, sum);
    sum = 65510u - multiply_high(part, sum);
    sum = 661577u - multiply_high(part, sum);
    sum = 5726720u - multiply_high(part, sum);
    sum = 41309550u - multiply_high(part, sum);
    sum = 238388332u - multiply_high(part, sum);
    sum = 1031764991u - multiply_high(part, sum);
    sum = 2977044472u - multiply_high(part, sum);
    return ((0x100000000ull - multiply_high(part, sum)) << 6) >> whole;
}

// The share of a sum below 2^58, in 2^-32.
DEVICE ulong64 share_of(ulong64 sum, ulong64 share) {
    return (sum >> 32) * share + (((sum & 0xffffffffull) * share) >> 32);
}

// Sums of the values of the threads before each, and of all, in the order of threads.
DEVICE ulong64 sum_before(POSITION ulong64 value, LOCAL ulong64& total, SHARED_POINTER(ulong64) scratch) {
    BARRIER();
    scratch[THREAD] = value;
    BARRIER();
    for (uint step = 1; step < THREADS; step *= 2) {
        ulong64 other = THREAD >= step ? scratch[THREAD - step] : 0;
        BARRIER();
        scratch[THREAD] += other;
        BARRIER();
    }
    total = scratch[THREADS - 1];
    return scratch[THREAD] - value;
}

// What is left of the tokens: those nearer than `distance`, and the first `ties` at this distance.
struct Cut {
    uint distance;
    ulong64 ties;
};

// Goes through a thread's scores. Threads take eight neighbours in turn, so that a SIMD group reads what lies together; the
// order of tokens is that of threads, then of what each of them has.
#define WALK ROLLED for (uint start = THREAD * 8; start < all.padded; start += THREADS * 8)

// How many tokens at the cut's distance come before this thread's.
DEVICE ulong64 ties_before(POSITION Scores all, Cut cut, SHARED_POINTER(ulong64) scratch) {
    if (cut.distance == 0xffffffffu) return 0;
    ulong64 own = 0, total;
    WALK {
        Eight eight = load_eight(all.values + start);
        for (uint j = 0; j < 8; ++j) own += distance_of(eight.v[j], all) == cut.distance;
    }
    return sum_before(HERE own, total, scratch);
}

DEVICE bool is_left(uint distance, Cut cut, LOCAL ulong64& before) {
    if (distance != cut.distance) return distance < cut.distance;
    return before++ < cut.ties;
}

// The smallest cut below `within` whose tokens measure at least `need`: by their number, or by their weights. Four rounds
// over eight bits of the distance each, counted in shared memory; weights by 13 bits, so that no sum of 2^19 overflows.
DEVICE Cut narrow_cut(POSITION
    Scores all, Cut within, bool by_weight, ulong64 need, SHARED_POINTER(uint) sums, SHARED_POINTER(ulong64) scratch) {
    ulong64 first = ties_before(HERE all, within, scratch), total;
    uint prefix = 0;
    ROLLED for (uint shift = 32; shift > 0; shift -= 8) {
        BARRIER();
        if (THREAD < 256) sums[THREAD] = sums[THREAD + 256] = sums[THREAD + 512] = 0;
        BARRIER();
        ulong64 before = first;
        WALK {
            Eight eight = load_eight(all.values + start);
            for (uint j = 0; j < 8; ++j) {
                uint distance = distance_of(eight.v[j], all);
                if (!is_left(distance, within, before) || (shift < 32 && distance >> shift != prefix)) continue;
                uint digit = (distance >> (shift - 8)) & 255;
                ulong64 measure = by_weight ? weight_of(distance) : 1;
                for (uint part = 0; measure > 0; ++part, measure >>= 13) {
                    atomic_add(sums + part * 256 + digit, (uint)measure & 0x1fffu);
                }
            }
        }
        BARRIER();
        ulong64 own = 0;
        if (THREAD < 256) {
            own = sums[THREAD] + ((ulong64)sums[THREAD + 256] << 13) + ((ulong64)sums[THREAD + 512] << 26);
        }
        ulong64 below = sum_before(HERE own, total, scratch);
        // One thread's digit is where the need is met; if all of them do not meet it, everything is left.
        if (need > total) return within;
        BARRIER();
        if (below < need && need <= below + own) {
            sums[0] = THREAD;
            scratch[0] = below;
        }
        BARRIER();
        prefix = shift < 32 ? prefix << 8 | sums[0] : sums[0];
        need -= scratch[0];
    }
    ulong64 each = by_weight ? weight_of(prefix) : 1;
    Cut cut = {prefix, (need + each - 1) / each};
    return cut;
}

// The weight of what is left, 0 for the rest.
DEVICE ulong64 weight_left(float score, Scores all, Cut cut, ulong64 least, LOCAL ulong64& before) {
    uint distance = distance_of(score, all);
    if (!is_left(distance, cut, before)) return 0;
    ulong64 weight = weight_of(distance);
    return weight >= least ? weight : 0;
}

// The sum of the weights of a thread's tokens that are left.
DEVICE ulong64 own_weight(POSITION Scores all, Cut cut, ulong64 least, ulong64 before) {
    ulong64 own = 0;
    WALK {
        Eight eight = load_eight(all.values + start);
        for (uint j = 0; j < 8; ++j) own += weight_left(eight.v[j], all, cut, least, before);
    }
    return own;
}

KERNEL(sample_draw)(GIVEN_POSITION
    const GLOBAL float* scores, const GLOBAL float* best_scores, const GLOBAL uint* best_tokens, GLOBAL uint* token,
    GLOBAL uint* position, GLOBAL uint* rows, GLOBAL int* ranges, const GLOBAL uint* limits, const GLOBAL uint* firsts,
    GLOBAL uint* log, GLOBAL uint* counts, GLOBAL uint* drawn, SCALAR(uint, groups), SCALAR(uint, kinds), SCALAR(uint, log_size), SCALAR(uint, vocabulary),
    SCALAR(float, factor), SCALAR(uint, top_k), SCALAR(ulong64, top_p), SCALAR(ulong64, least_weight),
    SCALAR(uint, seed_low), SCALAR(uint, seed_high), SCALAR(uint, stream)) {
    SHARED float best[1024];
    SHARED uint tokens[1024], sums[768], chosen[1];
    SHARED ulong64 scratch[1024];
    best_of_all(HERE best_scores, best_tokens, groups, best, tokens);
    bool is_fit = !is_nan(best[0]) && best[0] != INFINITE && best[0] != -INFINITE;
    Scores all = {scores, (vocabulary + 7) / 8 * 8, is_fit ? best[0] : 0.0f, factor};
    Cut cut = {0xffffffffu, 0xffffffffu};
    ulong64 total = 0;
    if (top_k > 0) cut = narrow_cut(HERE all, cut, false, top_k, sums, scratch);
    if (top_p < 0x100000000ull) {
        sum_before(HERE own_weight(HERE all, cut, 0, ties_before(HERE all, cut, scratch)), total, scratch);
        ulong64 need = share_of(total, top_p);
        cut = narrow_cut(HERE all, cut, true, need > 0 ? need : 1, sums, scratch);
    }
    ulong64 first = ties_before(HERE all, cut, scratch), own = own_weight(HERE all, cut, least_weight, first);
    ulong64 sum = sum_before(HERE own, total, scratch);
    uint words[4];
    philox(drawn[0], seed_low, seed_high, 0, stream, words);
    ulong64 target = share_of(total, words[0]);
    if (THREAD == 0) chosen[0] = tokens[0];
    BARRIER();
    // The sum is past the target from one token of one thread on.
    if (sum <= target && target < sum + own) {
        WALK {
            Eight eight = load_eight(all.values + start);
            for (uint j = 0; j < 8; ++j) {
                bool is_before = sum <= target;
                sum += weight_left(eight.v[j], all, cut, least_weight, first);
                if (is_before && sum > target) chosen[0] = start + j;
            }
        }
    }
    BARRIER();
    Place place = {token, position, rows, ranges, limits, firsts, log, counts, drawn, kinds, log_size};
    if (THREAD == 0) move_on(place, is_fit ? chosen[0] : UNFIT);
}
