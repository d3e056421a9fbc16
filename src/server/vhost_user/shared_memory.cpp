#include "server/vhost_user/shared_memory.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <limits>
#include <mutex>
#include <utility>

#include "storage/file.h"

namespace qcow::vhost_user {
namespace {

/// A mapping that the handler of SIGBUS knows.
struct Watched {
    std::atomic<std::uintptr_t> begin = 0;  // 0: the place is free
    std::atomic<std::uintptr_t> end = 0;
    std::atomic<std::uintptr_t> page = 0;  // bytes
    std::atomic<std::uint64_t> losses = 0;
};

std::array<Watched, 1024> watched;

std::mutex mutex;  // of the following
std::size_t count = 0;
struct sigaction before = {};

/// Async-signal-safe: mmap is a system call.
void replace_page(int signal, siginfo_t* info, void* context) {
    auto* const fault = static_cast<std::byte*>(info->si_addr);
    const auto address = reinterpret_cast<std::uintptr_t>(fault);
    for (auto& memory : watched) {
        const auto begin = memory.begin.load();
        if (begin == 0 || address < begin || address >= memory.end.load()) continue;
        const auto page = memory.page.load();
        auto* const at = fault - (address - begin) % page;
        const int error = errno;
        const auto* const mapped =
            mmap(at, page, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        errno = error;
        if (mapped == MAP_FAILED) break;
        ++memory.losses;
        return;
    }
    if ((before.sa_flags & SA_SIGINFO) != 0) {
        before.sa_sigaction(signal, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(signal);
    } else {
        // The access is repeated, and ends the process.
        std::signal(signal, SIG_DFL);
    }
}

/// Returns the index of a place for the mapping; none if all are taken.
Result<std::size_t> watch(const std::byte* mapping, std::size_t length, std::size_t page) {
    const std::lock_guard lock(mutex);
    for (std::size_t i = 0; i < watched.size(); ++i) {
        if (watched[i].begin != 0) continue;
        if (count++ == 0) {
            struct sigaction action = {};
            action.sa_sigaction = replace_page;
            action.sa_flags = SA_SIGINFO;
            sigaction(SIGBUS, &action, &before);
        }
        watched[i].end = reinterpret_cast<std::uintptr_t>(mapping) + length;
        watched[i].page = page;
        watched[i].losses = 0;
        watched[i].begin = reinterpret_cast<std::uintptr_t>(mapping);
        return i;
    }
    return fail(Errc::unsupported, "shared memory", "there are too many pieces of memory");
}

void stop_watching(std::size_t index) {
    const std::lock_guard lock(mutex);
    watched[index].begin = 0;
    if (--count == 0) sigaction(SIGBUS, &before, nullptr);
}

}  // namespace

Result<SharedMemory> SharedMemory::map(int fd, std::uint64_t offset, std::uint64_t length) {
    struct stat status = {};
    if (fstat(fd, &status) != 0) return system_error("cannot be examined", "shared memory", errno);
    const auto page = static_cast<std::uint64_t>(status.st_blksize);
    constexpr std::uint64_t most = std::numeric_limits<std::int64_t>::max();
    if (length == 0 || offset > most || length > most - offset || page == 0 || (page & (page - 1)) != 0)
        return fail(Errc::invalid_argument, "shared memory", "has no possible size");
    // Devices have no size.
    if (S_ISREG(status.st_mode) && static_cast<std::uint64_t>(status.st_size) < offset + length)
        return fail(Errc::invalid_argument, "shared memory", "is shorter than the front end says");
    // From the beginning, because offsets into huge pages cannot be mapped.
    const auto whole = (offset + length + page - 1) / page * page;
    auto* const mapping =
        static_cast<std::byte*>(mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0));
    if (mapping == MAP_FAILED) return system_error("cannot be mapped", "shared memory", errno);
    SharedMemory memory;
    memory.mapping_ = mapping;
    memory.mapped_ = whole;
    madvise(mapping, whole, MADV_DONTDUMP);
    auto place = watch(mapping, whole, page);
    if (!place) {
        munmap(mapping, whole);
        memory.mapping_ = nullptr;
        return std::unexpected(std::move(place).error());
    }
    memory.watched_ = *place;
    memory.bytes_ = {mapping + offset, length};
    return memory;
}

SharedMemory::SharedMemory(SharedMemory&& other) noexcept { *this = std::move(other); }

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
    std::swap(mapping_, other.mapping_);
    std::swap(mapped_, other.mapped_);
    std::swap(bytes_, other.bytes_);
    std::swap(watched_, other.watched_);
    return *this;
}

SharedMemory::~SharedMemory() {
    if (mapping_ == nullptr) return;
    // The other way round, somebody else's mapping could be taken for this one.
    stop_watching(watched_);
    munmap(mapping_, mapped_);
}

std::uint64_t SharedMemory::losses() const { return mapping_ == nullptr ? 0 : watched[watched_].losses.load(); }

}  // namespace qcow::vhost_user
