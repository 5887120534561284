/* Faults on command: every process of a run is started with this library before libc (LD_PRELOAD), and looks at one shared page
 * that says which of the operations on files below a folder fails, and how. tests/faults.py writes the page.
 *
 *   cc -shared -fPIC -O1 -o faults.so faults.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NONE, DISK_FULL, RENAME, SYNC, KILL, TERMINATE, KILL_DRIVER, MEMORY, CLOCK };

struct page {            /* the same layout as in faults.py */
  long mode, at;         /* which fault, and at which byte (DISK_FULL), rename, sync or operation it comes */
  long driver;           /* the process that TERMINATE and KILL_DRIVER are sent to */
  long bytes, renames, syncs, operations; /* counted so far, in all processes */
  long happened;         /* whether the fault came */
  char root[PATH_MAX];   /* files below it count */
};

static struct page *page;

__attribute__((constructor)) static void map_page(void) {
  const char *name = getenv("FAULTS_PAGE");
  int file = name ? (int)syscall(257 /* openat */, AT_FDCWD, name, O_RDWR | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *at = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (at != MAP_FAILED) page = at;
  close(file);
}

static int is_below(const char *path) { return !strncmp(path, page->root, strlen(page->root)); }

static int counts_path(int folder, const char *path) {
  char whole[2 * PATH_MAX], link[64];
  if (!page || !page->root[0] || !path) return 0;
  if (path[0] == '/') return is_below(path);
  if (folder == AT_FDCWD) {
    if (!getcwd(whole, PATH_MAX)) return 0;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t size = readlink(link, whole, PATH_MAX - 1);
    if (size < 0) return 0;
    whole[size] = 0;
  }
  strcat(whole, "/");
  strncat(whole, path, PATH_MAX - 1);
  return is_below(whole);
}

static int counts_file(int file) {
  char link[64], path[PATH_MAX];
  if (!page || !page->root[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size <= 0) return 0;
  path[size] = 0;
  return is_below(path);
}

static long next(long *counter) { return __atomic_add_fetch(counter, 1, __ATOMIC_SEQ_CST); }

static int comes_now(long mode, long count) {
  if (page->mode != mode || count != page->at) return 0;
  page->happened = 1;
  return 1;
}

/* One operation on a file that counts: what happens to whole processes comes at such a moment. */
static void operation(void) {
  long count = next(&page->operations);
  if (comes_now(KILL, count)) kill(getpid(), SIGKILL);
  if (comes_now(TERMINATE, count)) kill((pid_t)page->driver, SIGTERM);
  if (comes_now(KILL_DRIVER, count)) kill((pid_t)page->driver, SIGKILL);
  if (comes_now(MEMORY, count)) {
    long pages = 0;
    FILE *statm = fopen("/proc/self/statm", "r");
    if (statm) {
      if (fscanf(statm, "%ld", &pages) != 1) pages = 0;
      fclose(statm);
    }
    struct rlimit limit = {pages * sysconf(_SC_PAGESIZE) + (1 << 20), RLIM_INFINITY};
    setrlimit(RLIMIT_AS, &limit);
  }
  comes_now(CLOCK, count);
}

/* How many of `wanted` bytes the disk still takes; -1 where it is full. */
static ssize_t room(size_t wanted) {
  operation();
  long after = __atomic_add_fetch(&page->bytes, (long)wanted, __ATOMIC_SEQ_CST);
  if (page->mode != DISK_FULL || after <= page->at) return (ssize_t)wanted;
  page->happened = 1;
  long left = (long)wanted - (after - page->at);
  if (left > 0) return left;
  errno = ENOSPC;
  return -1;
}

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *data, size_t size) {
  static ssize_t (*real)(int, const void *, size_t);
  if (!real) real = REAL(write);
  if (!size || !counts_file(file)) return real(file, data, size);
  ssize_t part = room(size);
  return part < 0 ? -1 : real(file, data, (size_t)part);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
  static ssize_t (*real)(int, const void *, size_t, off64_t);
  if (!real) real = REAL(pwrite64);
  if (!size || !counts_file(file)) return real(file, data, size, at);
  ssize_t part = room(size);
  return part < 0 ? -1 : real(file, data, (size_t)part, at);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
  static ssize_t (*real)(int, const struct iovec *, int);
  if (!real) real = REAL(writev);
  if (count <= 0 || !counts_file(file)) return real(file, parts, count);
  size_t size = 0;
  for (int i = 0; i < count; i++) size += parts[i].iov_len;
  ssize_t part = room(size);
  if (part < 0) return -1;
  if ((size_t)part == size) return real(file, parts, count);
  size_t first = parts[0].iov_len < (size_t)part ? parts[0].iov_len : (size_t)part;
  return REAL(write)(file, parts[0].iov_base, first);
}

ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
  static ssize_t (*real)(int, int, off64_t *, size_t);
  if (!real) real = REAL(sendfile64);
  struct stat facts;
  if (!counts_file(to)) return real(to, from, at, size);
  off64_t done = at ? *at : lseek64(from, 0, SEEK_CUR);
  size_t rest = fstat(from, &facts) == 0 && facts.st_size > done ? (size_t)(facts.st_size - done) : 0;
  if (!rest) return real(to, from, at, size);
  ssize_t part = room(rest < size ? rest : size);
  return part < 0 ? -1 : real(to, from, at, (size_t)part);
}
ssize_t sendfile(int to, int from, off_t *at, size_t size) { return sendfile64(to, from, (off64_t *)at, size); }

ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t size, unsigned flags) {
  if (counts_file(to)) {
    errno = EXDEV; /* the caller copies by hand, with write */
    return -1;
  }
  return REAL(copy_file_range)(from, from_at, to, to_at, size, flags);
}

static int fails_to_rename(void) {
  operation();
  if (!comes_now(RENAME, next(&page->renames))) return 0;
  errno = EIO;
  return 1;
}

int rename(const char *from, const char *to) {
  if (counts_path(AT_FDCWD, to) && fails_to_rename()) return -1;
  return REAL(rename)(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
  if (counts_path(to_folder, to) && fails_to_rename()) return -1;
  return REAL(renameat)(from_folder, from, to_folder, to);
}

static int fails_to_sync(void) {
  operation();
  if (!comes_now(SYNC, next(&page->syncs))) return 0;
  errno = EIO;
  return 1;
}

int fsync(int file) { return counts_file(file) && fails_to_sync() ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return counts_file(file) && fails_to_sync() ? -1 : REAL(fdatasync)(file); }

int unlink(const char *path) {
  if (counts_path(AT_FDCWD, path)) operation();
  return REAL(unlink)(path);
}

int unlinkat(int folder, const char *path, int flags) {
  if (counts_path(folder, path)) operation();
  return REAL(unlinkat)(folder, path, flags);
}

int mkdir(const char *path, mode_t mode) {
  if (counts_path(AT_FDCWD, path)) operation();
  return REAL(mkdir)(path, mode);
}

static int was_set_back(clockid_t clock) {
  return page && page->mode == CLOCK && page->happened && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = REAL(clock_gettime);
  int failed = real(clock, time);
  if (!failed && was_set_back(clock)) time->tv_sec -= 24 * 3600;
  return failed;
}
