// Compares the speed of the engine, in process, with pread and pwrite on a raw file of the same size.
//
//   QCOW_BENCH_MEMORY   directory of the images for most cases (default: /dev/shm)
//   QCOW_BENCH_DISK     directory of the images for cases with flushes, on a real disk (default: current directory)

#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <memory>
#include <vector>

#include "qcow/create.h"
#include "qcow/files_in_use.h"
#include "qcow/image.h"

namespace {

using namespace qcow;

constexpr std::uint64_t KiB = 1024;
constexpr std::uint64_t MiB = 1024 * KiB;
constexpr std::uint64_t disk_bytes = 512 * MiB;
constexpr std::size_t block = 4 * KiB;

template <class T>
T must(Result<T> result) {
    if (!result) {
        std::cerr << result.error().message() << "\n";
        std::exit(1);
    }
    if constexpr (!std::is_void_v<T>) return *std::move(result);
}

std::string directory(const char* variable, const char* otherwise) {
    const char* value = std::getenv(variable);
    return value != nullptr ? value : otherwise;
}
std::string in_memory(const std::string& name) {
    return directory("QCOW_BENCH_MEMORY", "/dev/shm") + "/qcow-bench-" + name;
}
std::string on_disk(const std::string& name) { return directory("QCOW_BENCH_DISK", ".") + "/qcow-bench-" + name; }

std::span<const std::byte> some_bytes(std::size_t length) {
    static const std::vector<std::byte> bytes(4 * MiB, std::byte{0x5a});
    return std::span(bytes).first(length);
}

/// A file that the destructor removes.
class File {
public:
    explicit File(std::string path) : path_(std::move(path)) { std::filesystem::remove(path_); }
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    ~File() { std::filesystem::remove(path_); }
    [[nodiscard]] const std::string& path() const { return path_; }

private:
    std::string path_;
};

class RawFile {
public:
    RawFile(const std::string& path, bool filled)
        : file_(path), fd_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)) {
        if (fd_ < 0 || ftruncate(fd_, disk_bytes) != 0) std::exit(1);
        for (std::uint64_t at = 0; filled && at < disk_bytes; at += 4 * MiB) write(at, some_bytes(4 * MiB));
    }
    ~RawFile() { close(fd_); }
    void read(std::uint64_t at, std::span<std::byte> to) const {
        if (pread(fd_, to.data(), to.size(), static_cast<off_t>(at)) != static_cast<ssize_t>(to.size())) std::exit(1);
    }
    void write(std::uint64_t at, std::span<const std::byte> from) const {
        if (pwrite(fd_, from.data(), from.size(), static_cast<off_t>(at)) != static_cast<ssize_t>(from.size()))
            std::exit(1);
    }
    void flush() const {
        if (fdatasync(fd_) != 0) std::exit(1);
    }

private:
    File file_;
    int fd_;
};

/// A qcow2 image, over a filled backing file if `over` names one.
class ImageFile {
public:
    ImageFile(const std::string& path, bool filled, const std::string& over = {}, bool encrypted = false)
        : file_(path) {
        const std::string_view secret = "x";
        const auto key = [&] { return Secret(std::as_bytes(std::span(secret))); };
        {
            FilesInUse in_use;
            auto file = must(NewFile::begin(path, in_use, "the image"));
            CreateOptions options;
            options.size = disk_bytes;
            if (!over.empty()) {
                options.backing_name = over;
                options.backing_format = "raw";
            }
            if (encrypted) options.encryption = {.key = std::make_shared<const Secret>(key()), .iter_time_ms = 10};
            must(create_image({file.storage(), nullptr}, options));
            must(file.publish());
        }
        OpenOptions options;
        options.writable = true;
        options.gate = local_files(true);
        options.keys = [&](const KeyRequest&) { return key(); };
        image_ = must(open_image(must(open_file(path, {.writable = true})), options));
        for (std::uint64_t at = 0; filled && at < disk_bytes; at += 4 * MiB) write(at, some_bytes(4 * MiB));
        if (filled) must(image_->flush());
    }
    ~ImageFile() { must(image_->close()); }
    void read(std::uint64_t at, std::span<std::byte> to) const { must(image_->read({at}, to)); }
    void write(std::uint64_t at, std::span<const std::byte> from) const { must(image_->write({at}, from)); }
    void flush() const { must(image_->flush()); }

private:
    File file_;
    std::shared_ptr<Image> image_;
};

/// A qcow2 image that is encrypted with AES-256-XTS.
class EncryptedFile : public ImageFile {
public:
    EncryptedFile(const std::string& path, bool filled) : ImageFile(path, filled, {}, true) {}
};

/// Pseudo-random offsets of requests of a length, which they are multiples of.
class Offsets {
public:
    Offsets(int thread, std::uint64_t length)
        : state_(0x9e3779b97f4a7c15 * static_cast<std::uint64_t>(thread + 1)), length_(length) {}
    std::uint64_t next() {
        state_ ^= state_ << 13;
        state_ ^= state_ >> 7;
        state_ ^= state_ << 17;
        return state_ % (disk_bytes / length_) * length_;
    }

private:
    std::uint64_t state_;
    std::uint64_t length_;
};

template <class Target>
std::unique_ptr<Target> shared_target;  // NOLINT: shared by the threads of one case

/// Reads of `state.range(0)` bytes.
template <class Target>
void random_reads(benchmark::State& state) {
    const auto length = static_cast<std::size_t>(state.range(0));
    if (state.thread_index() == 0) shared_target<Target> = std::make_unique<Target>(in_memory("random"), true);
    std::vector<std::byte> buffer(length);
    Offsets offsets(state.thread_index(), length);
    for (auto _ : state) shared_target<Target>->read(offsets.next(), buffer);
    state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(length));
    if (state.thread_index() == 0) shared_target<Target>.reset();
}

/// Writes of `state.range(0)` bytes.
template <class Target>
void random_overwrites(benchmark::State& state) {
    const auto length = static_cast<std::size_t>(state.range(0));
    if (state.thread_index() == 0) shared_target<Target> = std::make_unique<Target>(in_memory("random"), true);
    Offsets offsets(state.thread_index(), length);
    for (auto _ : state) shared_target<Target>->write(offsets.next(), some_bytes(length));
    state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(length));
    if (state.thread_index() == 0) shared_target<Target>.reset();
}

/// Fills an empty disk from front to back with writes of `state.range(0)` bytes.
template <class Target>
void allocating_writes(benchmark::State& state) {
    const auto length = static_cast<std::size_t>(state.range(0));
    std::unique_ptr<Target> target;
    std::uint64_t at = disk_bytes;
    for (auto _ : state) {
        if (at == disk_bytes) {
            state.PauseTiming();
            target.reset();
            target = std::make_unique<Target>(in_memory("fresh"), false);
            at = 0;
            state.ResumeTiming();
        }
        target->write(at, some_bytes(length));
        at += length;
    }
    state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(length));
}

/// The first write of 4 KiB to each cluster of 64 KiB, over a backing file.
void copy_on_write(benchmark::State& state) {
    const RawFile backing(in_memory("backing"), true);
    std::unique_ptr<ImageFile> target;
    std::uint64_t at = disk_bytes;
    for (auto _ : state) {
        if (at == disk_bytes) {
            state.PauseTiming();
            target.reset();
            target = std::make_unique<ImageFile>(in_memory("overlay"), false, in_memory("backing"));
            at = 0;
            state.ResumeTiming();
        }
        target->write(at + 8 * KiB, some_bytes(block));
        at += 64 * KiB;
    }
    state.SetItemsProcessed(state.iterations());
}

/// What copy on write has to do: read 64 KiB, change 4 KiB of them, write 64 KiB.
void copying_by_hand(benchmark::State& state) {
    const RawFile backing(in_memory("backing"), true);
    std::unique_ptr<RawFile> target;
    std::vector<std::byte> buffer(64 * KiB);
    std::uint64_t at = disk_bytes;
    for (auto _ : state) {
        if (at == disk_bytes) {
            state.PauseTiming();
            target.reset();
            target = std::make_unique<RawFile>(in_memory("overlay"), false);
            at = 0;
            state.ResumeTiming();
        }
        backing.read(at, buffer);
        std::ranges::copy(some_bytes(block), buffer.begin() + 8 * KiB);
        target->write(at, buffer);
        at += 64 * KiB;
    }
    state.SetItemsProcessed(state.iterations());
}

/// Repeats a write of 4 KiB to an unallocated cluster, and a flush, on a real disk.
template <class Target>
void write_and_flush(benchmark::State& state) {
    const Target target(on_disk("flush"), false);
    std::uint64_t at = 0;
    for (auto _ : state) {
        target.write(at, some_bytes(block));
        target.flush();
        at = (at + 64 * KiB + block) % disk_bytes;
    }
    state.SetItemsProcessed(state.iterations());
}

BENCHMARK(random_reads<RawFile>)->Arg(4 * KiB)->Arg(1 * MiB)->ThreadRange(1, 2)->UseRealTime();
BENCHMARK(random_reads<ImageFile>)->Arg(4 * KiB)->Arg(1 * MiB)->ThreadRange(1, 2)->UseRealTime();
BENCHMARK(random_reads<EncryptedFile>)->Arg(4 * KiB)->Arg(1 * MiB)->ThreadRange(1, 2)->UseRealTime();
BENCHMARK(random_overwrites<RawFile>)->Arg(4 * KiB)->Arg(1 * MiB)->ThreadRange(1, 2)->UseRealTime();
BENCHMARK(random_overwrites<ImageFile>)->Arg(4 * KiB)->Arg(1 * MiB)->ThreadRange(1, 2)->UseRealTime();
BENCHMARK(random_overwrites<EncryptedFile>)->Arg(4 * KiB)->Arg(1 * MiB)->ThreadRange(1, 2)->UseRealTime();
BENCHMARK(allocating_writes<RawFile>)->Arg(4 * KiB)->Arg(64 * KiB)->Arg(1 * MiB)->UseRealTime();
BENCHMARK(allocating_writes<ImageFile>)->Arg(4 * KiB)->Arg(64 * KiB)->Arg(1 * MiB)->UseRealTime();
BENCHMARK(allocating_writes<EncryptedFile>)->Arg(4 * KiB)->Arg(64 * KiB)->Arg(1 * MiB)->UseRealTime();
BENCHMARK(copying_by_hand)->UseRealTime();
BENCHMARK(copy_on_write)->UseRealTime();
BENCHMARK(write_and_flush<RawFile>)->UseRealTime();
BENCHMARK(write_and_flush<ImageFile>)->UseRealTime();

}  // namespace

BENCHMARK_MAIN();
