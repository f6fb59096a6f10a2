// The least of an operating system that a static program of glibc needs: it reads the program from the disk and answers
// a handful of system calls. Output goes to port 0xe9, which Bochs prints. In ROM: constants and .bss alone.
#include <elf.h>
#include <stddef.h>
#include <stdint.h>

// The disk's first sector; the program's file follows.
struct Config {
  uint64_t xcr0;  // 0: OSXSAVE stays off
  uint64_t memory;
  uint64_t program_bytes;
  char strings[488];  // arguments, an empty one, environment, an empty one
};

static struct Config config;
static char* const kImage = (char*)0x8000000;
static char* const kHeap = (char*)0xc000000;
static char *heap_end, *mapped;
static uint64_t stack_words[128];
static struct {
  uint16_t offset, selector, type, offset16;
  uint32_t offset32, zero;
} gates[32];
static struct {
  uint16_t limit;
  uint64_t base;
} __attribute__((packed)) gates_at;
extern char exceptions[], system_call[];

static void out(uint16_t port, uint8_t x) { __asm__ volatile("outb %0, %1" : : "a"(x), "Nd"(port)); }
static uint8_t in(uint16_t port) {
  uint8_t x;
  __asm__ volatile("inb %1, %0" : "=a"(x) : "Nd"(port));
  return x;
}
static void write_msr(uint32_t at, uint64_t x) {
  __asm__ volatile("wrmsr" : : "c"(at), "a"((uint32_t)x), "d"((uint32_t)(x >> 32)));
}
static void clear(void* at, uint64_t bytes) {
  __asm__ volatile("rep stosb" : "+D"(at), "+c"(bytes) : "a"(0) : "memory");
}
static void print(const char* s) {
  for (; *s; ++s) out(0xe9, (uint8_t)*s);
}
static void print_number(const char* name, uint64_t x) {
  print(name);
  for (int shift = 60; shift >= 0; shift -= 4) out(0xe9, (uint8_t)"0123456789abcdef"[x >> shift & 15]);
}
static void __attribute__((noreturn)) stop(void) {
  print("\n");
  for (const char* s = "Shutdown"; *s; ++s) out(0x8900, (uint8_t)*s);
  for (;;) __asm__ volatile("hlt");
}

void exception(uint64_t vector, uint64_t error, uint64_t at) {
  print_number("\nexception ", vector);
  print_number(" error ", error);
  print_number(" at ", at);
  stop();
}

int64_t answer(uint64_t call, uint64_t a, uint64_t b, uint64_t c) {
  enum { kWrite = 1, kMmap = 9, kBrk = 12, kWritev = 20, kExit = 60, kArchPrctl = 158, kExitGroup = 231 };
  switch (call) {
    case kWrite:
      for (uint64_t i = 0; i < c; ++i) out(0xe9, ((uint8_t*)b)[i]);
      return (int64_t)c;
    case kWritev: {
      int64_t total = 0;
      for (uint64_t i = 0; i < c; ++i) total += answer(kWrite, a, ((uint64_t*)b)[2 * i], ((uint64_t*)b)[2 * i + 1]);
      return total;
    }
    case kBrk:
      if ((char*)a > heap_end) clear(heap_end, a - (uint64_t)heap_end);
      if ((char*)a >= kHeap) heap_end = (char*)a;
      return (int64_t)heap_end;
    case kMmap:
      mapped -= (b + 4095) & ~4095ul;
      if (mapped < heap_end + (4 << 20)) return -12;
      clear(mapped, b);
      return (int64_t)mapped;
    case kArchPrctl:
      if (a == 0x1002) write_msr(0xc0000100, b);  // FS base
      return 0;
    case kExit:
    case kExitGroup:
      print_number("\nexit ", a);
      stop();
    case 10:  // mprotect
    case 11:  // munmap
      return 0;
    default:
      return -38;
  }
}

static void read_sector(uint32_t sector, char* to) {
  out(0x1f6, (uint8_t)(0xe0 | sector >> 24));
  out(0x1f2, 1);
  out(0x1f3, (uint8_t)sector);
  out(0x1f4, (uint8_t)(sector >> 8));
  out(0x1f5, (uint8_t)(sector >> 16));
  out(0x1f7, 0x20);
  while ((in(0x1f7) & 0x88) != 0x08) continue;
  uint64_t words = 256;
  __asm__ volatile("rep insw" : "+D"(to), "+c"(words) : "d"((uint16_t)0x1f0) : "memory");
}

void start(void) {
  for (int i = 0; i < 32; ++i) {
    const uint64_t at = (uint64_t)exceptions + 16 * (uint64_t)i;
    gates[i].offset = (uint16_t)at;
    gates[i].selector = 0x18;
    gates[i].type = 0x8e00;
    gates[i].offset16 = (uint16_t)(at >> 16);
  }
  gates_at.limit = sizeof(gates) - 1;
  gates_at.base = (uint64_t)gates;
  __asm__ volatile("lidt %0" : : "m"(gates_at));
  write_msr(0xc0000081, 0x0018001800000000ul);   // STAR
  write_msr(0xc0000082, (uint64_t)system_call);  // LSTAR

  read_sector(0, (char*)&config);
  for (uint32_t at = 0; at < config.program_bytes; at += 512) read_sector(1 + at / 512, kImage + at);
  if (config.xcr0 != 0) {
    __asm__ volatile("mov %%cr4, %%rax\nor $0x40000, %%eax\nmov %%rax, %%cr4" : : : "rax");
    __asm__ volatile("xsetbv" : : "c"(0), "a"((uint32_t)config.xcr0), "d"(0));
  }

  const Elf64_Ehdr* file = (const Elf64_Ehdr*)kImage;
  const Elf64_Phdr* segment = (const Elf64_Phdr*)(kImage + file->e_phoff);
  uint64_t headers = 0;
  for (int i = 0; i < file->e_phnum; ++i) {
    if (segment[i].p_type != PT_LOAD) continue;
    char *to = (char*)segment[i].p_vaddr, *from = kImage + segment[i].p_offset;
    uint64_t bytes = segment[i].p_filesz;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
    clear(to, segment[i].p_memsz - segment[i].p_filesz);
    if (segment[i].p_offset == 0) headers = segment[i].p_vaddr + file->e_phoff;
  }
  heap_end = kHeap;
  mapped = (char*)config.memory - (8 << 20);

  int count = 1;
  const char* s = config.strings;
  for (int list = 0; list < 2; ++list) {
    for (; *s; ++s) {
      stack_words[count++] = (uint64_t)s;
      if (list == 0) ++stack_words[0];
      while (*s) ++s;
    }
    ++s;
    stack_words[count++] = 0;
  }
  const uint64_t auxiliary[] = {AT_PHDR,   headers, AT_PHENT, sizeof(Elf64_Phdr), AT_PHNUM,  file->e_phnum,
                                AT_PAGESZ, 4096,    AT_ENTRY, file->e_entry,      AT_RANDOM, (uint64_t)kImage,
                                AT_NULL,   0};
  for (unsigned i = 0; i < sizeof(auxiliary) / 8; ++i) stack_words[count++] = auxiliary[i];
  uint64_t* stack = (uint64_t*)(config.memory - 8192);
  for (int i = 0; i < count; ++i) stack[i] = stack_words[i];
  __asm__ volatile("mov %0, %%rsp\nxor %%edx, %%edx\njmp *%1" : : "r"(stack), "r"(file->e_entry));
  __builtin_unreachable();
}
