// Runs a grid on the host: see instructions.cuh. One file of kernels and this one make a shared library.
//
// The blocks of a grid are shared out over threads of the system; the threads of a block are fibers of one of them. A
// fiber runs until its warp or its block must meet. The order of warps, and of lanes within a warp, turns around with
// `order`, so that a test can run a kernel in both and find what only a lucky order made right.
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <sched.h>

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulator {
namespace {

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr size_t PAGE = 4096;

enum class State { Running, AtBarrier, Done };
constexpr u32 ALL = 0xffffffffu;

// One bit a lane: which can run, and which wait for the others of their warp.
struct Warp { u32 ready, waiting; };

struct Copy { void* shared; const void* global; bool valid; };

struct Fiber {
    Thread thread;
    Call call;
    void* stack_pointer;
    State state;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};

struct Block {
    const char* kernel;
    const Entry* entry;
    const void* arguments;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    void* scheduler;
    Fiber* running;
    bool backwards;
};

thread_local Block* here = nullptr;

// Saves the registers that a callee must keep, changes stacks, and goes on where the other stack left off.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

void describe_place(char* text, size_t size) {
    if (here == nullptr || here->running == nullptr) {
        snprintf(text, size, "outside any kernel");
        return;
    }
    const Thread& t = here->running->thread;
    snprintf(text, size, "kernel %s, block (%u, %u, %u) of (%u, %u, %u), thread %u of %u", here->kernel, t.blockIdx.x,
             t.blockIdx.y, t.blockIdx.z, t.gridDim.x, t.gridDim.y, t.gridDim.z, t.threadIdx.x, t.blockDim.x);
}

void on_fault(int, siginfo_t* info, void*) {
    char place[256], text[400];
    describe_place(place, sizeof place);
    const int n = snprintf(text, sizeof text, "emulator: access to %p, outside of every buffer: %s\n", info->si_addr, place);
    (void)!write(2, text, size_t(n));
    _exit(139);
}

void install_handler() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, nullptr);
        sigaction(SIGBUS, &action, nullptr);
    });
}

void leave(State state);

void to_scheduler(Fiber& fiber) { emulator_switch(&fiber.stack_pointer, here->scheduler); }

void run_fiber() {
    here->entry->body(here->arguments);
    Fiber& fiber = *here->running;
    for (const auto& group : fiber.groups)
        if (!group.empty()) fail("ends with asynchronous copies that nobody waited for");
    if (!fiber.open.empty()) fail("ends with asynchronous copies that are in no group");
    leave(State::Done);
    __builtin_unreachable();
}

void prepare(Fiber& fiber, u8* stack) {
    void** top = reinterpret_cast<void**>(stack + STACK_BYTES);
    *--top = nullptr;                                // return address of run_fiber, which does not return
    *--top = reinterpret_cast<void*>(&run_fiber);
    top -= 6;                                        // the six registers
    fiber.stack_pointer = top;
    fiber.state = State::Running;
    fiber.groups.clear();
    fiber.open.clear();
}

// The next lane of `ready`, which is not empty, in the order that the launch asked for.
u32 next_lane(const Block& block, u32 ready) {
    return block.backwards ? 31 - u32(__builtin_clz(ready)) : u32(__builtin_ctz(ready));
}

// Runs one lane until it must wait.
void resume(Block& block, Fiber& fiber) {
    block.running = &fiber;
    emulator_switch(&block.scheduler, fiber.stack_pointer);
}

[[noreturn]] void lanes_apart(Block& block, u32 warp) {
    fprintf(stderr, "emulator: the lanes of warp %u do not meet, kernel %s, block (%u, %u, %u):\n", warp, block.kernel,
            block.fibers[0].thread.blockIdx.x, block.fibers[0].thread.blockIdx.y, block.fibers[0].thread.blockIdx.z);
    for (u32 lane = 0; lane < 32; ++lane) {
        const Fiber& fiber = block.fibers[warp * 32 + lane];
        const bool waiting = block.warps[warp].waiting >> lane & 1;
        const char* at = waiting ? fiber.call.name : fiber.state == State::AtBarrier ? "__syncthreads" : "the end";
        fprintf(stderr, "  lane %u waits at %s\n", lane, at);
    }
    _exit(134);
}

// Runs a warp until all its lanes stand at a barrier or are done.
void run_warp(Block& block, u32 warp) {
    while (block.warps[warp].ready != 0)
        resume(block, block.fibers[warp * 32 + next_lane(block, block.warps[warp].ready)]);
    const State first = block.fibers[warp * 32].state;
    bool together = block.warps[warp].waiting == 0;
    for (u32 lane = 1; lane < 32; ++lane) together = together && block.fibers[warp * 32 + lane].state == first;
    if (!together) lanes_apart(block, warp);
}

void run_block(Block& block) {
    const u32 warps = u32(block.fibers.size()) / 32;
    for (;;) {
        for (u32 i = 0; i < warps; ++i) run_warp(block, block.backwards ? warps - 1 - i : i);
        u32 arrived = 0, done = 0;
        for (const Fiber& fiber : block.fibers) {
            arrived += fiber.state == State::AtBarrier;
            done += fiber.state == State::Done;
        }
        if (done == block.fibers.size()) return;
        if (arrived != block.fibers.size()) {
            fprintf(stderr, "emulator: %u threads of %zu stand at __syncthreads, the others have ended: kernel %s\n",
                    arrived, block.fibers.size(), block.kernel);
            _exit(134);
        }
        for (Fiber& fiber : block.fibers) fiber.state = State::Running;
        for (Warp& warp : block.warps) warp.ready = ALL;
    }
}

u8* map(size_t bytes) {
    void* place = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (place == MAP_FAILED) fail("no memory for stacks");
    return static_cast<u8*>(place);
}

// Stacks are kept between launches by each thread of the system.
struct Stacks {
    std::vector<u8*> all;
    u8* shared = nullptr;
    ~Stacks() {
        for (u8* stack : all) munmap(stack - PAGE, STACK_BYTES + PAGE);
        if (shared != nullptr) munmap(shared, SHARED_MAX + PAGE);
    }
    static constexpr size_t SHARED_MAX = 256 * 1024;
    u8* stack(size_t i) {
        while (all.size() <= i) {
            u8* place = map(STACK_BYTES + PAGE);
            mprotect(place, PAGE, PROT_NONE);
            all.push_back(place + PAGE);
        }
        return all[i];
    }
    // Ends at a guard page.
    u8* shared_memory(size_t bytes) {
        if (bytes > SHARED_MAX) fail("more shared memory than a block can have");
        if (shared == nullptr) {
            shared = map(SHARED_MAX + PAGE);
            mprotect(shared + SHARED_MAX, PAGE, PROT_NONE);
        }
        return shared + SHARED_MAX - (bytes + 127) / 128 * 128;
    }
};
thread_local Stacks stacks;

}  // namespace

void fail(const char* what) {
    char place[256];
    describe_place(place, sizeof place);
    fprintf(stderr, "emulator: %s: %s\n", what, place);
    _exit(134);
}

Thread& current() { return here->running->thread; }

void meet(const char* name, WarpOperation operation, const void* in0, const void* in1, void* out, u32 number) {
    Block& block = *here;
    Fiber& fiber = *block.running;
    const u32 index = fiber.thread.threadIdx.x / 32, bit = 1u << (fiber.thread.threadIdx.x % 32);
    Fiber* lanes = &block.fibers[index * 32];
    Warp& warp = block.warps[index];
    fiber.call = {name, in0, in1, out, number};
    warp.ready &= ~bit;
    warp.waiting |= bit;
    if (warp.waiting != ALL) {
        // Straight to a lane that can run; through the scheduler if none can.
        void* to = block.scheduler;
        if (warp.ready != 0) {
            block.running = &lanes[next_lane(block, warp.ready)];
            to = block.running->stack_pointer;
        }
        emulator_switch(&fiber.stack_pointer, to);
        return;
    }
    Call* calls[32];
    for (u32 i = 0; i < 32; ++i) {
        calls[i] = &lanes[i].call;
        if (calls[i]->name != name && std::strcmp(calls[i]->name, name) != 0) lanes_apart(block, index);
    }
    operation(calls);
    warp = {ALL, 0};
}

namespace {
void leave(State state) {
    Fiber& fiber = *here->running;
    fiber.state = state;
    here->warps[fiber.thread.threadIdx.x / 32].ready &= ~(1u << (fiber.thread.threadIdx.x % 32));
    to_scheduler(fiber);
}
}  // namespace

void barrier() { leave(State::AtBarrier); }

void copy_later(void* shared, const void* global, bool valid) {
    const uintptr_t to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
    if (to % 16 != 0 || (valid && from % 16 != 0)) fail("an asynchronous copy that is not aligned to 16 bytes");
    here->running->open.push_back({shared, global, valid});
}

void close_group() {
    Fiber& fiber = *here->running;
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

void land_groups(u32 pending) {
    Fiber& fiber = *here->running;
    const size_t landing = fiber.groups.size() > pending ? fiber.groups.size() - pending : 0;
    for (size_t i = 0; i < landing; ++i)
        for (const Copy& copy : fiber.groups[i]) {
            if (copy.valid) std::memcpy(copy.shared, copy.global, 16);
            else std::memset(copy.shared, 0, 16);
        }
    fiber.groups.erase(fiber.groups.begin(), fiber.groups.begin() + long(landing));
}

void yield() { sched_yield(); }

u64 clock_nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return u64(now.tv_sec) * 1000000000u + u64(now.tv_nsec);
}

}  // namespace emulator

// Runs a grid to its end. 0, or 1 when the launch itself is wrong; what a kernel does wrong ends the process.
extern "C" int emulator_launch(const char* name, const emulator::Entry* entry, const u32* grid, u32 threads,
                               u32 shared_bytes, const void* arguments, u32 argument_bytes, u32 system_threads,
                               u32 backwards) {
    using namespace emulator;
    if (argument_bytes != entry->argument_bytes || threads > entry->threads || threads % 32 != 0 || threads == 0) {
        fprintf(stderr, "emulator: kernel %s takes %u bytes of arguments and at most %u threads, got %u and %u\n", name,
                entry->argument_bytes, entry->threads, argument_bytes, threads);
        return 1;
    }
    install_handler();
    const u64 blocks = u64(grid[0]) * grid[1] * grid[2];
    std::atomic<u64> next{0};
    auto work = [&] {
        Block block{name, entry, arguments, {}, {}, nullptr, nullptr, backwards != 0};
        block.fibers.resize(threads);
        block.warps.resize(threads / 32);
        Block* outer = here;
        here = &block;
        u8* shared = stacks.shared_memory(shared_bytes);
        for (u64 taken; (taken = next.fetch_add(1)) < blocks;) {
            const u64 index = backwards != 0 ? blocks - 1 - taken : taken;
            const Index place = {u32(index % grid[0]), u32(index / grid[0] % grid[1]), u32(index / grid[0] / grid[1])};
            std::memset(shared, 0xff, (shared_bytes + 127) / 128 * 128);
            for (u32 i = 0; i < threads; ++i) {
                Fiber& fiber = block.fibers[i];
                fiber.thread = {{i, 0, 0}, place, {threads, 1, 1}, {grid[0], grid[1], grid[2]}, shared, shared_bytes};
                prepare(fiber, stacks.stack(i));
            }
            for (Warp& warp : block.warps) warp = {ALL, 0};
            run_block(block);
        }
        here = outer;
    };
    std::vector<std::thread> helpers;
    for (u32 i = 1; i < system_threads && i < blocks; ++i) helpers.emplace_back(work);
    work();
    for (std::thread& helper : helpers) helper.join();
    return 0;
}
