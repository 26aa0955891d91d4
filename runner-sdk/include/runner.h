/* runner.h - write a runner for runner-host in C. ABI version 2.0, a draft: it may change until it is frozen.
 *
 * A plugin is a shared library that exports runner_module_v2() and holds a JSON manifest in the
 * section ".runner" (RUNNER_PLUGIN below). It needs nothing but this header. The same tables are
 * declared in Rust in runner-sdk/src/abi; a test compares them entry by entry.
 *
 * Instances
 * - The library is opened once. create() makes an instance from a config; its answer is a number of your choice,
 *   such as a pointer. The host passes that number to start(), cancel(), shutdown() and log_level().
 * - Pass the host word of the instance to every entry of runner_host.
 *
 * Tasks
 * - start() returns at once. Exactly one complete() follows, from any thread, or inside start().
 * - A task that was cancelled must still be completed.
 * - After complete(), the task does not exist: every call for it answers RUNNER_STALE and has no effect.
 *
 * Answers
 * - A call with a reply answers exactly once, from any thread: also on the calling thread, before the call returns.
 * - The answer may come after complete(): calls in progress then answer RUNNER_STALE. Keep `user` until the answer.
 * - reply may be NULL: no answer is wanted. The call is made all the same.
 * - You may make calls inside a reply and inside a release. These are nested at most 16 deep on a thread; a deeper
 *   one comes on another thread.
 * - At most 1024 calls of a task may be in progress. The next one answers RUNNER_LIMIT.
 * - An instance for which 65536 answers wait gets no more answers and no more tasks. Only calls that multiply
 *   without end lead there.
 *
 * Threads
 * - The host calls the entries and replies of one instance one after the other. When one does not return within some
 *   milliseconds, the next one comes on another thread. Instances are independent of one another.
 * - cancel(task) may come before start(task) has returned, or has even registered the task.
 *   After start() has registered the task, ask host->cancelled() once.
 * - cancel(task) may also come during or after complete(task). Ignore a task that you do not know.
 * - Every entry of runner_host may be called from any thread, several at once, also for one task.
 * - Two calls on one stream: make the next one after the answer to the last one. Otherwise their order is not defined.
 * - shutdown() is the last call for an instance. No task is running in it. You may free the instance in shutdown().
 *   After that, calls with its host word answer RUNNER_STALE.
 *
 * Values
 * - runner_str and the request structs are borrowed for the call: copy what you keep.
 * - runner_bytes changes its owner: call release(owner) once when done, unless release is NULL. The host calls it in
 *   the call that passed the bytes, or as it calls a reply.
 * - Texts are UTF-8 and at most 1 MiB. Those of log and complete may be longer and are cut.
 * - A NULL pointer with a length, or a length above 2^48, is refused and not read.
 * - Let no C++ exception and no longjmp leave an entry or a reply.
 *
 * Growth
 * - A minor version appends entries to the tables and fields to the requests. It changes and removes nothing. Every
 *   host of this major version runs every plugin of it, older or newer.
 * - What a minor version appended says "since 2.N". Everything else is in every host of this major version.
 * - Call an entry of the host that says "since" only if its bit is set: RUNNER_HAS(api, RUNNER_HOST_<ENTRY>).
 *   Read a field that says "since" only if RUNNER_REACHES(request, field).
 * - If your plugin cannot work without an appended entry, put "min_abi":"2.N" into the manifest. An older host then
 *   refuses the plugin when it loads it.
 * - "wants":["token"] in the manifest: a host refuses the plugin when it loads it, unless plugins.toml grants the token.
 *   Unknown words are ignored. "requires":["word"]: a host that does not know the word refuses the plugin.
 *   Hosts ignore all other keys.
 * - Of runner_module, the entries of RUNNER_MODULE_NEEDED are mandatory: create, start, cancel and shutdown. All
 *   others are optional, and so is every entry that a later version appends. NULL counts as missing.
 *   Initialise the table with names ({.create = create}), or leave later entries out: they are then NULL.
 * - The mask says how long a table is. The host calls an entry of yours only if its bit is set and if the host knows
 *   the entry. Set no bit beyond your table: use the mask of the header that you compile with.
 */
#ifndef RUNNER_H
#define RUNNER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RUNNER_MAGIC UINT64_C(0x52554e4e45527632) /* "RUNNERv2" */
#define RUNNER_ABI_MAJOR 2
#define RUNNER_ABI_MINOR 0
#define RUNNER_ABI_VERSION ((uint32_t)((RUNNER_ABI_MAJOR << 16) | RUNNER_ABI_MINOR))
/* The version as the manifest has it. */
#define RUNNER_ABI RUNNER_TEXT_OF(RUNNER_ABI_MAJOR) "." RUNNER_TEXT_OF(RUNNER_ABI_MINOR)
#define RUNNER_TEXT_OF(macro) RUNNER_TEXT(macro)
#define RUNNER_TEXT(words) #words

/* Borrowed UTF-8 text; ptr may be NULL when len is 0. */
typedef struct { const uint8_t *ptr; size_t len; } runner_str;

/* Bytes that change their owner; release may be NULL. */
typedef struct {
  const uint8_t *ptr;
  size_t len;
  void *owner;
  void (*release)(void *owner);
} runner_bytes;

typedef uint64_t runner_host_word; /* names your instance to the host */
typedef uint64_t runner_instance;  /* names your instance to you */
typedef uint64_t runner_task;      /* one running task */

/* How a task ended: 0 to 63. Any other number counts as RUNNER_END_FAILED. */
typedef int32_t runner_end;
enum {
  RUNNER_END_OK = 0,
  RUNNER_END_FAILED = 1,
  RUNNER_END_RETRYABLE = 2,     /* a retry may succeed */
  RUNNER_END_CANCELLED = 3,
  RUNNER_END_INVALID_INPUT = 4, /* a retry will not help */
  RUNNER_END_PANICKED = 5,
  RUNNER_END_STORAGE = 6        /* inputs or outputs could not be transferred */
};

/* The result of a call: 0, or an error from 64 to 127. Handle any other number as RUNNER_OTHER. */
typedef int32_t runner_status;
enum {
  RUNNER_OK = 0,
  RUNNER_OTHER = 64,
  RUNNER_UNSUPPORTED = 65, RUNNER_STALE = 66, RUNNER_NOT_FOUND = 67, RUNNER_BAD_REQUEST = 68,
  RUNNER_INVALID_PATH = 69, RUNNER_UNAUTHORIZED = 70, RUNNER_CONFLICT = 71, RUNNER_SERVER = 72,
  RUNNER_NETWORK = 73, RUNNER_MALFORMED = 74, RUNNER_LEASE_OVER = 75, RUNNER_LOCAL = 76,
  RUNNER_LIMIT = 77, RUNNER_SETUP = 78, RUNNER_PANICKED = 79
};

/* Receives an answer. With RUNNER_OK, number and data are the answer; otherwise data is one line of text.
 * data belongs to the function. */
typedef void (*runner_callback)(void *user, runner_status status, uint64_t number, runner_bytes data);

/* What an instance is created from. */
typedef struct {
  uint32_t size;             /* bytes of this struct, as the host knows it */
  uint32_t abi;              /* the host's RUNNER_ABI_VERSION */
  uint32_t log_level;        /* most verbose level worth logging: 1 error ... 5 trace, 0 none */
  uint32_t capabilities_len;
  const runner_str *capabilities; /* what this instance serves */
  runner_str name;           /* its name in the node's log */
  runner_str config;         /* its config from plugins.toml: a JSON object, {} if there is none */
} runner_create_request;

/* A task to start. */
typedef struct {
  uint32_t size;             /* bytes of this struct, as the host knows it */
  uint32_t inputs_len;
  const runner_str *inputs;  /* each is a cid for input_open and input_file */
  runner_str capability;
  runner_str dir;            /* the task's own folder, removed with it */
  runner_str task_id;
  runner_str traceparent;    /* W3C trace context, or empty */
  runner_str lease;          /* the whole lease as JSON, without tokens: lease.task.meta, and so on */
} runner_start_request;

/* Whether the request is long enough to have a field. */
#define RUNNER_REACHES(request, field) \
  ((request)->size >= (size_t)((const char *)(&(request)->field + 1) - (const char *)(request)))

/* Flag of input_open: you keep the whole input in memory. The host charges its memory budget until the input is
 * closed, and the answer waits until the input fits. RUNNER_LIMIT if it can never fit. */
#define RUNNER_INPUT_KEEP UINT64_C(1)

/* The host's table; valid until the process ends. JSON answers may get more fields; null means unknown. */
typedef struct {
  uint64_t present; /* one bit per entry, the first entry lowest */
  uintptr_t reserved;
  /* Writes a line to the host's log. task may be 0. fields_json is an object or empty. */
  void (*log)(runner_host_word host, runner_task task, uint32_t level, runner_str target, runner_str text,
              runner_str fields_json);
  /* 0: go on. 1: the task should stop. RUNNER_STALE: it has ended. */
  int32_t (*cancelled)(runner_host_word host, runner_task task);
  /* Ends the task. Unless end is RUNNER_END_OK, text is the reason in one line. details_json is any JSON for the
   * job's author, or empty. Returns RUNNER_STALE if the task has already ended. */
  runner_status (*complete)(runner_host_word host, runner_task task, runner_end end, runner_str text,
                            runner_str details_json);
  /* Replaces the progress: any JSON of at most 64 KiB. */
  void (*progress)(runner_host_word host, runner_task task, runner_str json, runner_callback reply, void *user);
  /* Appends an event: any JSON of at most 64 KiB. Answers when the event has a place in the queue. */
  void (*event)(runner_host_word host, runner_task task, runner_str json, runner_callback reply, void *user);
  /* {"tokens_in": number, "tokens_out": number, "usd_cost": number}, each optional: what the task has used since the
   * last call. A task that is over its budget of tokens is cancelled before the answer. */
  void (*usage)(runner_host_word host, runner_task task, runner_str json, runner_callback reply, void *user);
  /* Answers plane, lease-lost, drained, deadline, budget or operator; nothing while the task may go on. */
  void (*cancel_reason)(runner_host_word host, runner_task task, runner_callback reply, void *user);
  /* Answers the bearer; the number is when it expires, in seconds since 1970, or 0. RUNNER_UNSUPPORTED unless it was
   * granted. */
  void (*token)(runner_host_word host, runner_task task, runner_callback reply, void *user);
  /* How long the task may still run. The number is the milliseconds until its lease or its time limit ends, or
   * UINT64_MAX; the data is {"lease_ms", "limit_ms"}. Heartbeats extend the lease. */
  void (*time_left)(runner_host_word host, runner_task task, runner_callback reply, void *user);
  /* Creates the task's directory again if it was removed. It exists when start is called. Answers on the calling
   * thread, before it returns, unless that is nested more than 32 deep. */
  void (*task_dir)(runner_host_word host, runner_task task, runner_callback reply, void *user);
  /* Opens an input. flags is 0 or RUNNER_INPUT_KEEP. The number is the stream; the data is
   * {"cid", "data_id", "name", "data_type", "domain_id", "size"}. */
  void (*input_open)(runner_host_word host, runner_task task, runner_str cid, uint64_t flags, runner_callback reply,
                     void *user);
  /* Answers the next bytes, at most max and at most 1 MiB; none is the end. */
  void (*input_read)(runner_host_word host, runner_task task, uint64_t stream, uint64_t max, runner_callback reply,
                     void *user);
  void (*input_close)(runner_host_word host, runner_task task, uint64_t stream, runner_callback reply, void *user);
  /* Brings an input to a file. Answers {"path", "root_dir", "related_files": [], "extracted_paths": []} and the
   * fields of input_open. */
  void (*input_file)(runner_host_word host, runner_task task, runner_str cid, runner_callback reply, void *user);
  /* Looks for data in the task's domain: {"name", "data_type", "ids": []}, each optional. The number is a stream for
   * input_read and input_close, with a line of JSON for each found data: {"id", "name", "data_type", "size",
   * "domain_id"}. The id is a cid for input_open. */
  void (*input_find)(runner_host_word host, runner_task task, runner_str query_json, runner_callback reply, void *user);
  /* Opens an artifact. options_json is empty or {"name", "data_type", "existing_id", "size"}, each optional. The
   * number is the stream. */
  void (*output_open)(runner_host_word host, runner_task task, runner_str path, runner_str options_json,
                      runner_callback reply, void *user);
  /* Appends to an artifact. data changes its owner. */
  void (*output_write)(runner_host_word host, runner_task task, uint64_t stream, runner_bytes data,
                       runner_callback reply, void *user);
  /* Publishes an artifact. Answers its id, or nothing. */
  void (*output_finish)(runner_host_word host, runner_task task, uint64_t stream, runner_callback reply, void *user);
  /* Discards an artifact. */
  void (*output_abort)(runner_host_word host, runner_task task, uint64_t stream, runner_callback reply, void *user);
  /* Publishes the file at the absolute path `file`. Answers as output_finish. */
  void (*output_file)(runner_host_word host, runner_task task, runner_str path, runner_str options_json,
                      runner_str file, runner_callback reply, void *user);
} runner_host;

/* Entries of runner_host, for RUNNER_HAS. */
enum {
  RUNNER_HOST_LOG, RUNNER_HOST_CANCELLED, RUNNER_HOST_COMPLETE, RUNNER_HOST_PROGRESS, RUNNER_HOST_EVENT,
  RUNNER_HOST_USAGE, RUNNER_HOST_CANCEL_REASON, RUNNER_HOST_TOKEN, RUNNER_HOST_TIME_LEFT, RUNNER_HOST_TASK_DIR,
  RUNNER_HOST_INPUT_OPEN, RUNNER_HOST_INPUT_READ, RUNNER_HOST_INPUT_CLOSE, RUNNER_HOST_INPUT_FILE,
  RUNNER_HOST_INPUT_FIND, RUNNER_HOST_OUTPUT_OPEN,
  RUNNER_HOST_OUTPUT_WRITE, RUNNER_HOST_OUTPUT_FINISH, RUNNER_HOST_OUTPUT_ABORT, RUNNER_HOST_OUTPUT_FILE,
  RUNNER_HOST_ENTRIES
};
/* Whether a host has an entry. */
#define RUNNER_HAS(host, entry) (((host)->present >> (entry)) & 1u)

/* What runner_module_v2() returns; valid until the process ends. */
typedef struct {
  uint64_t magic;     /* RUNNER_MAGIC */
  uint32_t abi;       /* RUNNER_ABI_VERSION */
  uint64_t present;   /* RUNNER_MODULE_MASK */
  uintptr_t reserved; /* 0 */
  /* Makes an instance. Answer RUNNER_OK and your number for it, or RUNNER_OTHER and one line of text, with which the
   * plugin is refused. */
  void (*create)(const runner_host *api, runner_host_word host, const runner_create_request *request,
                 runner_callback reply, void *user);
  void (*start)(runner_instance instance, runner_task task, const runner_start_request *request);
  /* The task should stop. Complete it soon. */
  void (*cancel)(runner_instance instance, runner_task task);
  /* The instance ends within deadline_ms. */
  void (*shutdown)(runner_instance instance, uint32_t deadline_ms);
  /* The most verbose level worth logging has changed. May be NULL. */
  void (*log_level)(runner_instance instance, uint32_t level);
} runner_module;

/* All five entries of runner_module, from create to log_level. An entry that is NULL counts as missing. */
#define RUNNER_MODULE_MASK UINT64_C(0x1f)
/* The four entries of runner_module that must not be NULL. */
#define RUNNER_MODULE_NEEDED UINT64_C(0xf)
/* All entries of runner_host in this version. */
#define RUNNER_HOST_MASK ((UINT64_C(1) << RUNNER_HOST_ENTRIES) - 1)
/* The four leading words of a runner_module. */
#define RUNNER_MODULE_HEAD RUNNER_MAGIC, RUNNER_ABI_VERSION, RUNNER_MODULE_MASK, 0

#if defined(_WIN32)
#define RUNNER_EXPORT __declspec(dllexport)
#else
#define RUNNER_EXPORT __attribute__((visibility("default")))
#endif

#if defined(__APPLE__)
#define RUNNER_SECTION __attribute__((used, section("__DATA,.runner")))
#else
#define RUNNER_SECTION __attribute__((used, section(".runner")))
#endif

/* Exported, and retained if the compiler supports it: --gc-sections must not drop the manifest. */
#if defined(__ELF__) && defined(__has_attribute)
#if __has_attribute(retain)
#define RUNNER_RETAIN __attribute__((retain))
#endif
#endif
#ifndef RUNNER_RETAIN
#define RUNNER_RETAIN
#endif
RUNNER_EXPORT extern const char runner_manifest[];

/* The manifest as JSON, for keys that RUNNER_PLUGIN does not have. */
#define RUNNER_MANIFEST(json) RUNNER_SECTION RUNNER_RETAIN const char runner_manifest[] = json

/* The manifest: RUNNER_PLUGIN("mine", "1.0.0", "\"/mine/v1\", \"/mine/other/v1\""); */
#define RUNNER_PLUGIN(name, version, capabilities)                                              \
  RUNNER_MANIFEST("{\"name\":\"" name "\",\"version\":\"" version "\",\"abi\":\"" RUNNER_ABI \
                  "\",\"capabilities\":[" capabilities "]}")

/* A string literal as runner_str. */
#define RUNNER_STR(literal) ((runner_str){(const uint8_t *)("" literal), sizeof(literal) - 1})

RUNNER_EXPORT const runner_module *runner_module_v2(void);

#ifdef __cplusplus
}
#endif
#endif
