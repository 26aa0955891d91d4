/* runner.h - write a runner for runner-host in C. ABI version 1.0.
 *
 * A plugin is a shared library that exports runner_module_v1() and holds a JSON manifest in the
 * section ".runner" (RUNNER_MANIFEST below). It needs nothing but this header. The same tables are
 * declared in Rust in runner-sdk/src/abi; a test compares them entry by entry.
 *
 * Rules
 * - start() returns at once; exactly one host->complete() follows, from any thread, or inline.
 * - Entries and callbacks are called one after the other. When one does not return within some
 *   milliseconds, the next one is called on another thread.
 * - cancel(task) may therefore come before start(task) has returned, or has even registered the task.
 *   After start() has registered the task, ask host->cancelled(task) once.
 * - Every host call with a callback answers exactly once, from any thread.
 * - runner_str is borrowed for the call. runner_bytes changes its owner: release it once when done.
 * - Entries are appended in later versions, never changed: test RUNNER_HAS before using one that
 *   this version does not declare as mandatory.
 * - Let no C++ exception and no longjmp leave an entry.
 */
#ifndef RUNNER_H
#define RUNNER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RUNNER_MAGIC UINT64_C(0x52554e4e45527631) /* "RUNNERv1" */
#define RUNNER_ABI_MAJOR 1
#define RUNNER_ABI_MINOR 2
#define RUNNER_ABI_VERSION ((uint32_t)((RUNNER_ABI_MAJOR << 16) | RUNNER_ABI_MINOR))

/* Borrowed UTF-8 text; ptr may be NULL when len is 0. */
typedef struct { const uint8_t *ptr; size_t len; } runner_str;

/* Bytes that change their owner; release may be NULL. */
typedef struct {
  const uint8_t *ptr;
  size_t len;
  void *owner;
  void (*release)(void *owner);
} runner_bytes;

/* One running task. Stale calls are answered RUNNER_STALE and have no effect. */
typedef uint64_t runner_task;

typedef int32_t runner_status;
enum {
  RUNNER_OK = 0, RUNNER_FAILED = 1, RUNNER_RETRYABLE = 2, RUNNER_CANCELLED = 3,
  RUNNER_INVALID_INPUT = 4, RUNNER_UNSUPPORTED = 5, RUNNER_STALE = 6, RUNNER_PANICKED = 7,
  RUNNER_STORAGE = 8,
  RUNNER_NOT_FOUND = 16, RUNNER_BAD_REQUEST = 17, RUNNER_INVALID_PATH = 18,
  RUNNER_UNAUTHORIZED = 19, RUNNER_CONFLICT = 20, RUNNER_SERVER = 21, RUNNER_NETWORK = 22,
  RUNNER_MALFORMED = 23, RUNNER_LEASE_OVER = 24, RUNNER_LOCAL = 25, RUNNER_LIMIT = 26,
  RUNNER_SETUP = 27, RUNNER_OTHER = 28
};

/* Receives an answer exactly once. With RUNNER_OK, data is the answer; otherwise one line of text.
 * data belongs to the callback. */
typedef void (*runner_callback)(void *user, runner_status status, runner_bytes data);

/* Values passed as text. The host may send additional fields; null means unknown.
 *
 * init        config_json: the plugin's config from plugins.toml, {} if there is none. Answer RUNNER_OK, or a
 *             status and one line of text, with which the plugin is refused.
 * start       request_json: {"capability", "dir", "lease"}. dir is the task's own folder, removed with it;
 *             lease is the lease without tokens: lease.task.inputs_cids, lease.task.meta, and so on.
 * log         level 1 to 5 as in log_level; fields_json is an object or empty. If task is 0, {"plugin": name} in
 *             it names the plugin.
 * progress, event   any JSON of at most 64 KiB.
 * cancel_reason     answers plane, lease-lost, drained, deadline, budget or operator; nothing while the task may go
 *             on.
 * token             answers the bearer; RUNNER_UNSUPPORTED unless it was granted.
 * input_open  answers {"stream": number, "cid", "data_id", "name", "data_type", "domain_id", "size"}.
 * input_read  answers at most max bytes; none is the end.
 * input_file  answers {"path", "root_dir", "related_files": [], "extracted_paths": []} and the fields of input_open
 *             without stream.
 * output_open, output_file   take {"path"} and, optionally, "name", "data_type", "existing_id", "size".
 * output_open answers {"stream": number}; output_finish and output_file answer {"id": text or null}.
 * task_dir    answers nothing, or why the directory cannot be created. Test RUNNER_HAS(host, 18) first.
 * usage       takes {"tokens_in": number, "tokens_out": number, "usd_cost": number}, each optional: what the task has
 *             used since the last call. Test RUNNER_HAS(host, 19) first.
 * complete    RUNNER_OK, or a status with text, one line, and details_json, any JSON for the job's author or empty.
 *             RUNNER_RETRYABLE, RUNNER_INVALID_INPUT and RUNNER_STORAGE tell whether a retry can help.
 *             Returns RUNNER_STALE if the task has already ended.
 */

/* The host's table; valid until the process ends. */
typedef struct {
  uint64_t present; /* one bit per entry, the first entry lowest */
  uintptr_t reserved;
  uint32_t abi;
  uint32_t log_level; /* most verbose level worth logging: 1 error ... 5 trace, 0 none */
  void (*log)(runner_task task, uint32_t level, runner_str target, runner_str text, runner_str fields_json);
  void (*progress)(runner_task task, runner_str json, runner_callback reply, void *user);
  void (*event)(runner_task task, runner_str json, runner_callback reply, void *user);
  int32_t (*cancelled)(runner_task task); /* 0: go on */
  void (*cancel_reason)(runner_task task, runner_callback reply, void *user);
  void (*token)(runner_task task, runner_callback reply, void *user);
  void (*input_open)(runner_task task, runner_str cid, runner_callback reply, void *user);
  /* `max` above 1 MiB: the caller keeps the input in memory. The host charges its budget (RUNNER_LIMIT). */
  void (*input_read)(runner_task task, uint64_t stream, uint64_t max, runner_callback reply, void *user);
  void (*input_close)(runner_task task, uint64_t stream, runner_callback reply, void *user);
  void (*input_file)(runner_task task, runner_str cid, runner_callback reply, void *user);
  void (*output_open)(runner_task task, runner_str spec_json, runner_callback reply, void *user);
  void (*output_write)(runner_task task, uint64_t stream, runner_bytes data, runner_callback reply, void *user);
  void (*output_finish)(runner_task task, uint64_t stream, runner_callback reply, void *user);
  void (*output_abort)(runner_task task, uint64_t stream, runner_callback reply, void *user);
  void (*output_file)(runner_task task, runner_str spec_json, runner_str path, runner_callback reply, void *user);
  runner_status (*complete)(runner_task task, runner_status status, runner_str text, runner_str details_json);
  /* Since 1.1, entry 18. Creates the task's directory again if it was removed. It exists when `start` is called.
   * Answers before it returns. */
  void (*task_dir)(runner_task task, runner_callback reply, void *user);
  /* Since 1.2, entry 19. A task that is over its budget of tokens is cancelled before the answer. */
  void (*usage)(runner_task task, runner_str json, runner_callback reply, void *user);
} runner_host;

/* The plugin's table. */
typedef struct {
  uint64_t present;   /* RUNNER_MODULE_MASK */
  uintptr_t reserved; /* 0 */
  uint64_t magic;     /* RUNNER_MAGIC */
  uint32_t abi;       /* RUNNER_ABI_VERSION */
  void (*init)(const runner_host *host, runner_str config_json, runner_callback reply, void *user);
  void (*start)(runner_task task, runner_str request_json);
  void (*cancel)(runner_task task);
  void (*shutdown)(uint32_t deadline_ms);
} runner_module;

/* All six entries of runner_module, from magic to shutdown. */
#define RUNNER_MODULE_MASK UINT64_C(0x3f)
/* All twenty entries of runner_host, from abi to usage. */
#define RUNNER_HOST_MASK UINT64_C(0xfffff)
/* Whether a table has entry number n (from 0). */
#define RUNNER_HAS(table, n) (((table)->present >> (n)) & 1u)

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

/* RUNNER_MANIFEST("{\"name\":\"mine\",\"version\":\"1.0.0\",\"abi\":\"1.0\",\"capabilities\":[\"/mine/v1\"]}"); */
#define RUNNER_MANIFEST(json) RUNNER_SECTION RUNNER_RETAIN const char runner_manifest[] = json

/* A string literal as runner_str. */
#define RUNNER_STR(literal) ((runner_str){(const uint8_t *)("" literal), sizeof(literal) - 1})

RUNNER_EXPORT const runner_module *runner_module_v1(void);

#ifdef __cplusplus
}
#endif
#endif
