// A library with NCCL's doors and no GPU behind them, which misbehaves as it is told: the first letter of the unique id
// says how. It holds callers to nccl.h of 2.18: the layout of the configuration and the order of arguments.
#include <limits.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { char internal[128]; } Id;
typedef struct {
    size_t size;
    unsigned int magic, version;
    int blocking, cgaClusterSize, minCTAs, maxCTAs;
    const char* netName;
    int splitShare;
} Config;
typedef struct { char mode; int polls, calls; } Comm;

enum { SUCCESS, CUDA, SYSTEM, INTERNAL, ARGUMENT, USAGE, REMOTE, IN_PROGRESS };
#ifndef VERSION
#define VERSION 21903
#endif

static const char* last = "";

int ncclGetVersion(int* version) { *version = VERSION; return SUCCESS; }
int ncclGetUniqueId(Id* id) { memset(id, 'r', sizeof *id); return SUCCESS; }
const char* ncclGetErrorString(int code) { return code == REMOTE ? "remote process exited" : "something failed"; }
const char* ncclGetLastError(Comm* comm) { (void)comm; return last; }

static int refuse(const char* why) { last = why; return ARGUMENT; }

int ncclCommInitRankConfig(Comm** comm, int ranks, Id id, int rank, Config* c) {
    const int undefined = INT_MIN;
    if (ranks != 4 || rank != 2 || id.internal[127] != id.internal[0]) return refuse("arguments of init");
    if (c->size != sizeof *c || c->magic != 0xcafebeefu || c->version != 21800 || c->blocking != 0)
        return refuse("the configuration's head");
    if (c->cgaClusterSize != undefined || c->minCTAs != undefined || c->maxCTAs != undefined || c->netName != NULL ||
        c->splitShare != undefined)
        return refuse("the configuration's fields");
    if (id.internal[0] == 'n') return SUCCESS;  // and no communicator
    *comm = calloc(1, sizeof **comm);
    (*comm)->mode = id.internal[0];
    if (id.internal[0] == 's') { last = "no interface"; return SYSTEM; }
    return IN_PROGRESS;
}

int ncclCommGetAsyncError(Comm* comm, int* state) {
    const char mode = comm->mode;
    *state = SUCCESS;
    if (mode == 'l' || mode == 'h' || comm->polls++ % 4 != 3) *state = IN_PROGRESS;
    else if (mode == 'e' && comm->calls > 0) { last = "rank 3 closed its connection"; *state = REMOTE; }
    return SUCCESS;
}

int ncclCommAbort(Comm* comm) {
    if (comm->mode == 'h') for (;;) pause();
    free(comm);
    return SUCCESS;
}
int ncclCommFinalize(Comm* comm) { comm->polls = 0; return IN_PROGRESS; }
int ncclCommDestroy(Comm* comm) { free(comm); return SUCCESS; }

int ncclAllReduce(const void* from, void* to, size_t count, int kind, int operation, Comm* comm, void* stream) {
    if ((size_t)from != 0x1000 || (size_t)to != 0x2000 || count != 96 || kind != 7 || operation != 0 ||
        (size_t)stream != 0x30)
        return refuse("arguments of all-reduce");
    ++comm->calls;
    comm->polls = 0;
    return IN_PROGRESS;
}
int ncclAllGather(const void* from, void* to, size_t count, int kind, Comm* comm, void* stream) {
    if ((size_t)from != 0x1000 || (size_t)to != 0x2000 || count != 17 || kind != 1 || (size_t)stream != 0x30)
        return refuse("arguments of all-gather");
    ++comm->calls;
    comm->polls = 3;
    return SUCCESS;
}
