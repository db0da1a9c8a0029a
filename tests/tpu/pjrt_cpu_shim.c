/* A PJRT plug-in that is another plug-in with its client options dropped.
 *
 * torch_tpu loads the plug-in that TPU_LIBRARY_PATH names and creates its client with options that only
 * libtpu knows; XLA's CPU plug-in refuses them.  This hands out a copy of the CPU plug-in's table of
 * functions (REAL_PJRT names the library) in which creating a client ignores options.
 *
 * Of the PJRT C API (https://github.com/openxla/xla/blob/main/xla/pjrt/c/pjrt_c_api.h) it relies on the
 * start alone: PJRT_Api begins with struct_size, extension_start and a PJRT_Api_Version of struct_size,
 * extension_start and two ints (5 words in all), then pointers to functions in a fixed order, the eleventh
 * of which is PJRT_Client_Create; its arguments begin with struct_size, extension_start, create_options and
 * num_options.  New functions are only ever appended.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    size_t struct_size;
    void *extension_start;
    const void *create_options;
    size_t num_options;
} ClientCreateArgs;

typedef void *(*ClientCreate)(ClientCreateArgs *);

enum { HEADER_WORDS = 5, CLIENT_CREATE = HEADER_WORDS + 10 };

static void **real;
static void **copy;

static void *create_without_options(ClientCreateArgs *args) {
    args->create_options = NULL;
    args->num_options = 0;
    return ((ClientCreate)real[CLIENT_CREATE])(args);
}

const void *GetPjrtApi(void) {
    if (copy != NULL) return copy;
    const char *path = getenv("REAL_PJRT");
    void *library = path == NULL ? NULL : dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        fprintf(stderr, "REAL_PJRT=%s: %s\n", path == NULL ? "(unset)" : path, path == NULL ? "not set" : dlerror());
        return NULL;
    }
    const void *(*get)(void) = (const void *(*)(void))dlsym(library, "GetPjrtApi");
    if (get == NULL) return NULL;
    real = (void **)get();
    size_t bytes = *(size_t *)real;
    copy = malloc(bytes);
    if (copy == NULL) return NULL;
    memcpy(copy, real, bytes);
    copy[CLIENT_CREATE] = (void *)create_without_options;
    return copy;
}
