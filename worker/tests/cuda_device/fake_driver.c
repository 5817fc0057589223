// A driver of CUDA for tests of the host's side: one device whose memory is the host's.
//
// What a stream is told happens as late as the real driver may do it: when somebody waits for it. So bytes that are
// overwritten too early, and memory that is freed while it is in use, show. Of kernels it knows `add` of rows.cu.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, CAPTURE = 900 };
enum Kind { COPY, CLEAR, ADD, EVENT };
struct Op { enum Kind kind; char* to; const char* from; size_t bytes; };
struct Ops { struct Op* list; size_t count, room, done; };
static struct Ops stream, capture;
static int capturing;
static size_t used;
static const size_t total = (size_t)1 << 30;

static void fail(const char* what) { fprintf(stderr, "fake driver: %s\n", what); abort(); }
static int push(struct Ops* ops, struct Op op) {
    if (ops->count == ops->room) ops->list = realloc(ops->list, (ops->room = ops->room * 2 + 64) * sizeof op);
    ops->list[ops->count++] = op;
    return OK;
}
static int tell(enum Kind kind, void* to, const void* from, size_t bytes) {
    return push(capturing ? &capture : &stream, (struct Op){kind, to, from, bytes});
}
static void run_one(void) {
    struct Op op = stream.list[stream.done++];
    if (op.kind == COPY) memcpy(op.to, op.from, op.bytes);
    if (op.kind == CLEAR) memset(op.to, 0, op.bytes);
    if (op.kind == ADD) for (size_t i = 0; i < op.bytes; ++i) ((float*)op.to)[i] += ((const float*)op.from)[i];
    if (op.kind == EVENT) --*(int*)op.to;
}
static void run_all(void) { while (stream.done < stream.count) run_one(); }
static void idle(const char* what) { if (stream.done < stream.count) fail(what); }

int cuInit(unsigned flags) { return flags; }
// NVRTC asks a driver that is there for a table of functions; of an empty one it uses nothing.
int cuGetExportTable(const void** table, const void* id) {
    static const size_t empty[8];
    (void)id;
    *table = empty;
    return OK;
}
int cuDriverGetVersion(int* version) { *version = 12020; return OK; }
int cuDeviceGetCount(int* count) { *count = 1; return OK; }
int cuDeviceGet(int* device, int index) { *device = index; return index == 0 ? OK : INVALID; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    (void)device;
    switch (attribute) {
        case 75: *value = 8; return OK;        // compute capability
        case 76: *value = 0; return OK;
        case 16: *value = 108; return OK;      // multiprocessors
        case 97: *value = 163 << 10; return OK;  // shared memory of a block
        default: return INVALID;
    }
}
int cuDeviceGetName(char* name, int length, int device) { (void)device; return snprintf(name, length, "fake") > 0 ? OK : INVALID; }
int cuDeviceGetPCIBusId(char* bus, int length, int device) { (void)device; return snprintf(bus, length, "0000:00:00.0") > 0 ? OK : INVALID; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { (void)device; *bytes = total; return OK; }
int cuGetErrorName(int code, const char** name) { *name = code == CAPTURE ? "FAKE_CAPTURE" : "FAKE_INVALID"; return OK; }
int cuGetErrorString(int code, const char** text) { (void)code; *text = "of the fake driver"; return OK; }
int cuDevicePrimaryCtxRetain(void** context, int device) { (void)device; *context = &used; return OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; idle("the context goes while the stream is busy"); return OK; }
int cuCtxSetCurrent(void* context) { return context == &used ? OK : INVALID; }
int cuStreamCreate(void** made, unsigned flags) { *made = &stream; return flags == 1 ? OK : INVALID; }
int cuStreamDestroy_v2(void* s) { (void)s; return OK; }
int cuStreamSynchronize(void* s) { (void)s; if (capturing) return CAPTURE; run_all(); return OK; }
int cuMemGetInfo_v2(size_t* free_bytes, size_t* all) { *free_bytes = total - used; *all = total; return OK; }
int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    if (capturing) fail("memory is allocated within a capture");
    if (bytes > total - used) return OUT_OF_MEMORY;
    char* block = aligned_alloc(256, (bytes + 511) / 256 * 256);
    used += *(size_t*)block = bytes;
    *address = (uint64_t)(block + 256);
    return OK;
}
int cuMemFree_v2(uint64_t address) {
    idle("memory is freed while the stream is busy");
    used -= *(size_t*)(address - 256);
    free((void*)(address - 256));
    return OK;
}
int cuMemHostAlloc(void** memory, size_t bytes, unsigned flags) { (void)flags; *memory = malloc(bytes); return OK; }
int cuMemFreeHost(void* memory) { idle("page-locked memory is freed while the stream is busy"); free(memory); return OK; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* s) { (void)s; return tell(COPY, (void*)to, from, bytes); }
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* s) { (void)s; return tell(COPY, to, (void*)from, bytes); }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* s) { (void)s; return tell(COPY, (void*)to, (void*)from, bytes); }
int cuMemsetD8Async(uint64_t at, unsigned char value, size_t bytes, void* s) { (void)s; return value ? INVALID : tell(CLEAR, (void*)at, NULL, bytes); }
int cuEventCreate(void** event, unsigned flags) { *event = calloc(1, sizeof(int)); return flags == 2 ? OK : INVALID; }
int cuEventDestroy_v2(void* event) { if (*(int*)event == 0) free(event); return OK; }
int cuEventRecord(void* event, void* s) { (void)s; ++*(int*)event; return tell(EVENT, event, NULL, 0); }
int cuEventSynchronize(void* event) { while (*(int*)event > 0) run_one(); return OK; }
int cuModuleLoadData(void** module, const void* image) { *module = &used; return memcmp(image, "\177ELF", 4) ? INVALID : OK; }
int cuModuleUnload(void* module) { (void)module; idle("a module goes while the stream is busy"); return OK; }
int cuModuleGetFunction(void** function, void* module, const char* name) { *function = module; return strcmp(name, "add") ? INVALID : OK; }
int cuFuncSetAttribute(void* function, int attribute, int value) { (void)function; return attribute == 8 && value <= 163 << 10 ? OK : INVALID; }
int cuFuncGetAttribute(int* value, int attribute, void* function) { (void)attribute; (void)function; *value = 14; return OK; }
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz, unsigned shared,
                   void* s, void** parameters, void** extra) {
    (void)function; (void)shared; (void)s;
    if (!x || !y || !z || !tx || ty != 1 || tz != 1 || parameters) return INVALID;
    if (extra[0] != (void*)1 || extra[2] != (void*)2 || *(size_t*)extra[3] != 24 || extra[4]) return INVALID;
    struct { float* x; const float* y; uint64_t count; } args;
    memcpy(&args, extra[1], sizeof args);
    return tell(ADD, args.x, args.y, args.count);
}
int cuStreamBeginCapture_v2(void* s, int mode) { (void)s; capture.count = 0; capturing = 1; return mode == 1 ? OK : INVALID; }
int cuStreamEndCapture(void* s, void** graph) {
    (void)s;
    struct Ops* made = calloc(1, sizeof *made);
    for (size_t i = 0; i < capture.count; ++i) push(made, capture.list[i]);
    capturing = 0;
    *graph = made;
    return OK;
}
int cuGraphInstantiateWithFlags(void** executable, void* graph, uint64_t flags) {
    struct Ops* made = calloc(1, sizeof *made);
    for (size_t i = 0; i < ((struct Ops*)graph)->count; ++i) push(made, ((struct Ops*)graph)->list[i]);
    *executable = made;
    return (int)flags;
}
int cuGraphDestroy(void* graph) { free(((struct Ops*)graph)->list); free(graph); return OK; }
int cuGraphUpload(void* graph, void* s) { (void)graph; (void)s; return OK; }
int cuGraphLaunch(void* graph, void* s) {
    (void)s;
    for (size_t i = 0; i < ((struct Ops*)graph)->count; ++i) push(&stream, ((struct Ops*)graph)->list[i]);
    return OK;
}
int cuGraphExecDestroy(void* graph) { return cuGraphDestroy(graph); }
