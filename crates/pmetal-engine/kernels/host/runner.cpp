// Runs kernels on the host: every thread of a group is a fibre, and a fibre runs until it comes to a barrier, a shuffle or
// its end. Which one runs next is decided by a seed, so that what depends on the order of threads shows. In half of the
// groups a SIMD group runs as far ahead of another as barriers let it, so that a barrier is missed that is needed before
// memory is used again; in the others SIMD groups take turns from shuffle to shuffle, so that one is missed without which
// another writes between a write and its read. Compiled behind prelude/host.h and a module; one launch at a time.

#include <stdlib.h>

#include <utility>

// A stack that can be left for another. On x86-64 by six instructions and the registers that a call preserves: the C
// library's way asks the kernel for the mask of signals every time, which is ten times slower.
#if defined(__x86_64__) && defined(__linux__)
struct HostContext { void* stack; };
extern "C" void host_switch(void** from, void* to);
asm(".text\n.globl host_switch\n.hidden host_switch\n.type host_switch, @function\n"
    "host_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size host_switch, .-host_switch\n");
static void host_change(HostContext* from, HostContext* to) { host_switch(&from->stack, to->stack); }
static void host_prepare(HostContext* context, char* stack, size_t bytes, void (*body)()) {
    // Six registers, where to return to, and a word, so that the stack is aligned as after a call.
    void** top = (void**)(((uintptr_t)stack + bytes) & ~(uintptr_t)15) - 8;
    memset(top, 0, 64);
    top[6] = (void*)body;
    context->stack = top;
}
#else
#include <ucontext.h>
struct HostContext { ucontext_t state; };
static void host_change(HostContext* from, HostContext* to) { swapcontext(&from->state, &to->state); }
static void host_prepare(HostContext* context, char* stack, size_t bytes, void (*body)()) {
    getcontext(&context->state);
    context->state.uc_stack.ss_sp = stack;
    context->state.uc_stack.ss_size = bytes;
    context->state.uc_link = nullptr;
    makecontext(&context->state, body, 0);
}
#endif

#ifdef __APPLE__
extern char host_shared_begin[] __asm("section$start$__DATA$kernel_shared");
extern char host_shared_end[] __asm("section$end$__DATA$kernel_shared");
#else
extern char host_shared_begin[] __asm("__start_kernel_shared") __attribute__((weak, visibility("hidden")));
extern char host_shared_end[] __asm("__stop_kernel_shared") __attribute__((weak, visibility("hidden")));
#endif

// A launch as the caller describes it. Kinds of arguments: `a` address, `u` 32 bits, `w` 64 bits, `f` float.
struct HostLaunch {
    uint groups[3];
    uint threads;
    ulong64 seed;
    ulong64 count;
    const char* kinds;
    const ulong64* arguments;
};

enum HostState { HOST_READY, HOST_BARRIER, HOST_SHUFFLE, HOST_DONE };

#define HOST_MOST_THREADS 1024
#define HOST_STACK_BYTES 65536
#define SIMD 32

static struct {
    HostContext scheduler, fibre[HOST_MOST_THREADS];
    char* stacks;
    HostState state[HOST_MOST_THREADS];
    float shuffled[HOST_MOST_THREADS];
    uint mask[HOST_MOST_THREADS];
    uint made;
    ulong64 random;
    void (*kernel)();
    void (*call)(void (*)(), const ulong64*);
    const ulong64* arguments;
    bool failed;
    char message[256];
} host;

static uint host_random(uint limit) {
    host.random ^= host.random << 13;
    host.random ^= host.random >> 7;
    host.random ^= host.random << 17;
    return (uint)((host.random >> 32) * limit >> 32);
}

static void host_shuffle_order(uint* order, uint count) {
    for (uint i = count; i > 1; --i) std::swap(order[i - 1], order[host_random(i)]);
}

static void host_wait(HostState state) {
    uint thread = host_place.thread;
    host.state[thread] = state;
    host_change(&host.fibre[thread], &host.scheduler);
}

static void host_barrier() { host_wait(HOST_BARRIER); }

static float host_shuffle_xor(float x, uint mask) {
    uint thread = host_place.thread;
    host.shuffled[thread] = x;
    host.mask[thread] = mask;
    host_wait(HOST_SHUFFLE);
    return host.shuffled[thread];
}

static void host_say(const char* what, uint thread) {
    const uint* group = host_place.group;
    snprintf(
        host.message, sizeof host.message, "thread %u of group (%u, %u, %u): %s", thread, group[0], group[1], group[2], what);
    host.failed = true;
}

[[noreturn]] static void host_fault(const char* what) {
    host_say(what, host_place.thread);
    host_wait(HOST_DONE);
    abort();  // A launch that failed never comes back to its fibres.
}

// What a fibre does; it serves one group after another.
static void host_fibre() {
    for (;;) {
        host.call(host.kernel, host.arguments);
        host_wait(HOST_DONE);
    }
}

static void host_make_fibres(uint count) {
    if (!host.stacks) host.stacks = (char*)malloc((size_t)HOST_MOST_THREADS * HOST_STACK_BYTES);
    for (; host.made < count; ++host.made) {
        char* stack = host.stacks + (size_t)host.made * HOST_STACK_BYTES;
        host_prepare(&host.fibre[host.made], stack, HOST_STACK_BYTES, host_fibre);
    }
}

// Exchanges the values of a SIMD group all of whose lanes have come to a shuffle.
static void host_exchange(uint first, uint lanes) {
    float values[SIMD];
    for (uint lane = 0; lane < lanes; ++lane) {
        uint other = lane ^ host.mask[first];
        if (host.mask[first + lane] != host.mask[first]) return host_say("lanes shuffle by different masks", first + lane);
        if (other >= lanes) return host_say("a shuffle reads a lane that is not there", first + lane);
        values[lane] = host.shuffled[first + other];
    }
    for (uint lane = 0; lane < lanes; ++lane) {
        host.shuffled[first + lane] = values[lane];
        host.state[first + lane] = HOST_READY;
    }
}

// Runs a SIMD group until its lanes wait or are done; true when they have exchanged values and can go on.
static bool host_advance(uint first, uint lanes) {
    uint order[SIMD], in_shuffle = 0;
    for (uint lane = 0; lane < lanes; ++lane) order[lane] = first + lane;
    host_shuffle_order(order, lanes);
    for (uint i = 0; i < lanes && !host.failed; ++i) {
        if (host.state[order[i]] != HOST_READY) continue;
        host_place.thread = order[i];
        host_change(&host.scheduler, &host.fibre[order[i]]);
    }
    for (uint lane = 0; lane < lanes; ++lane) in_shuffle += host.state[first + lane] == HOST_SHUFFLE;
    if (in_shuffle == lanes && !host.failed) host_exchange(first, lanes);
    for (uint lane = 0; in_shuffle > 0 && in_shuffle < lanes && lane < lanes && !host.failed; ++lane) {
        if (host.state[first + lane] != HOST_SHUFFLE) host_say("it is not at the shuffle of its SIMD group", first + lane);
    }
    return in_shuffle == lanes && !host.failed;
}

static void host_run_group(uint threads) {
    uint simd_groups = (threads + SIMD - 1) / SIMD, order[HOST_MOST_THREADS / SIMD];
    if (host_shared_begin) memset(host_shared_begin, 0xff, (size_t)(host_shared_end - host_shared_begin));
    for (uint i = 0; i < threads; ++i) host.state[i] = HOST_READY;
    bool takes_turns = host_random(2);
    for (;;) {
        for (uint i = 0; i < simd_groups; ++i) order[i] = i * SIMD;
        host_shuffle_order(order, simd_groups);
        for (uint left = simd_groups; left > 0 && !host.failed;) {
            uint i = takes_turns ? host_random(left) : 0, first = order[i];
            if (!host_advance(first, threads - first < SIMD ? threads - first : SIMD)) order[i] = order[--left];
        }
        uint done = 0, last = 0;
        for (uint i = 0; i < threads; ++i) {
            if (host.state[i] != HOST_DONE) continue;
            last = i;
            ++done;
        }
        if (host.failed || done == threads) return;
        if (done > 0) return host_say("it has returned while others wait at a barrier", last);
        for (uint i = 0; i < threads; ++i) host.state[i] = HOST_READY;
    }
}

static const char* host_run_groups(const HostLaunch* launch) {
    ulong64 count = (ulong64)launch->groups[0] * launch->groups[1] * launch->groups[2];
    if (launch->threads > HOST_MOST_THREADS || launch->threads == 0 || count > 0xffffffffu) return "its grid is too large";
    host.random = launch->seed * 0x9E3779B97F4A7C15u | 1;
    host.arguments = launch->arguments;
    host.failed = false;
    host_make_fibres(launch->threads);
    host_place.threads = launch->threads;
    for (int i = 0; i < 3; ++i) host_place.groups[i] = launch->groups[i];
    uint* order = (uint*)malloc(count * sizeof(uint));
    for (uint i = 0; i < count; ++i) order[i] = i;
    host_shuffle_order(order, (uint)count);
    for (uint i = 0; i < count && !host.failed; ++i) {
        host_place.group[0] = order[i] % launch->groups[0];
        host_place.group[1] = order[i] / launch->groups[0] % launch->groups[1];
        host_place.group[2] = order[i] / launch->groups[0] / launch->groups[1];
        host_run_group(launch->threads);
    }
    free(order);
    if (!host.failed) return nullptr;
    host.made = 0;  // Fibres that are in the middle of a kernel are given up.
    return host.message;
}

template <typename T> struct HostArgument;
template <typename T> struct HostArgument<T*> {
    static constexpr char kind = 'a';
    static T* get(ulong64 bits) { return (T*)bits; }
};
template <> struct HostArgument<uint> {
    static constexpr char kind = 'u';
    static uint get(ulong64 bits) { return (uint)bits; }
};
template <> struct HostArgument<ulong64> {
    static constexpr char kind = 'w';
    static ulong64 get(ulong64 bits) { return bits; }
};
template <> struct HostArgument<float> {
    static constexpr char kind = 'f';
    static float get(ulong64 bits) { return as_float((uint)bits); }
};

template <typename... P> struct HostCall {
    typedef void Kernel(HostPosition, P...);
    template <size_t... I> static void spread(Kernel* kernel, const ulong64* bits, std::index_sequence<I...>) {
        kernel(HostPosition(), HostArgument<P>::get(bits[I])...);
    }
    static void call(void (*kernel)(), const ulong64* bits) {
        spread((Kernel*)kernel, bits, std::index_sequence_for<P...>());
    }
};

// Runs a kernel; null, or what went wrong.
template <typename... P> static const char* host_run(void (*kernel)(HostPosition, P...), const HostLaunch* launch) {
    const char kinds[] = {HostArgument<P>::kind..., 0};
    if (launch->count != sizeof...(P) || memcmp(kinds, launch->kinds, sizeof...(P)) != 0) {
        snprintf(
            host.message, sizeof host.message, "its parameters are %s, it was given %.*s", kinds, (int)launch->count,
            launch->kinds);
        return host.message;
    }
    host.kernel = (void (*)())kernel;
    host.call = HostCall<P...>::call;
    return host_run_groups(launch);
}

#define HOST_ENTRY(name) \
    extern "C" const char* launch_##name(const HostLaunch* launch) { return host_run(name, launch); }
