/* Gathers two weighted rows through the C interface and reads the message of a wrong call. */
#include <stdio.h>
#include <string.h>

#include "lemo/lemo.h"

static lemo_tensor view(void* data, lemo_dtype dtype, int64_t rows, int64_t columns) {
  lemo_tensor t;
  memset(&t, 0, sizeof(t));
  t.data = data;
  t.dtype = dtype;
  t.ndim = columns > 0 ? 2 : 1;
  t.shape[0] = rows;
  t.shape[1] = columns;
  t.stride[0] = columns > 0 ? columns : 1;
  t.stride[1] = 1;
  return t;
}

int main(void) {
  float x[3][2] = {{1, 2}, {3, 4}, {5, 6}};
  int32_t rows[3] = {2, -1, 0};
  int32_t slots[3] = {0, 0, 1};
  float weights[2] = {2, 10};
  float out[3][2] = {{-1, -1}, {-1, -1}, {-1, -1}};
  const float expected[3][2] = {{10, 12}, {0, 0}, {10, 20}};
  lemo_exec exec;
  lemo_gather_args args;
  memset(&exec, 0, sizeof(exec));
  memset(&args, 0, sizeof(args));
  exec.struct_size = sizeof(exec);
  args.struct_size = sizeof(args);
  args.x = view(x, LEMO_F32, 3, 2);
  args.rows = view(rows, LEMO_I32, 3, 0);
  args.weights = view(weights, LEMO_F32, 2, 0);
  args.slots = view(slots, LEMO_I32, 3, 0);
  args.out = view(out, LEMO_F32, 3, 2);

  rows[0] = 3;
  if (lemo_gather(&exec, &args) != LEMO_INVALID_ARGUMENT || strstr(lemo_last_error(), "rows") == NULL ||
      out[0][0] != -1) {
    fprintf(stderr, "a row out of range: unexpected answer '%s'\n", lemo_last_error());
    return 1;
  }
  rows[0] = 2;
  if (lemo_gather(&exec, &args) != LEMO_OK) {
    fprintf(stderr, "%s\n", lemo_last_error());
    return 1;
  }
  if (memcmp(out, expected, sizeof(out)) != 0) {
    fprintf(stderr, "unexpected result\n");
    return 1;
  }

  /* A struct that ends before `weights`: the fields it lacks are absent, and `out` is required. */
  args.struct_size = (uint64_t)((char*)&args.weights - (char*)&args);
  if (lemo_gather(&exec, &args) != LEMO_INVALID_ARGUMENT || strstr(lemo_last_error(), "out") == NULL) {
    fprintf(stderr, "a struct without `out`: unexpected answer '%s'\n", lemo_last_error());
    return 1;
  }
  printf("lemo %s ok\n", lemo_version());
  return 0;
}
