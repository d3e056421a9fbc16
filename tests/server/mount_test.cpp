// Disks that are mounted as files. The disk of most tests is in this process, and so are the programs that use the
// file.

#include "qcow/mount.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/falloc.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

#include "base/bits.h"
#include "base/page_memory.h"
#include "server/mounted_file.h"
#include "server/test_disk.h"
#include "storage/file.h"
#include "support/disks.h"
#include "support/qemu.h"
#include "support/random.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow::test {
namespace {

enum class On : bool { file, directory };

/// A disk that is mounted as long as this lives.
class Mounted {
public:
    explicit Mounted(std::shared_ptr<Disk> disk, On on = On::file, MountOptions options = {}) {
        if (on == On::file) write_file(path(), "hidden");
        if (on == On::directory) std::filesystem::create_directory(path());
        options.failed = [this](const Error& error) {
            const std::lock_guard lock(mutex_);
            failures_.push_back(error);
        };
        mount_ = must(Mount::make(std::move(disk), path(), options));
        thread_ = std::thread([this] {
            result_ = mount_->run();
            mount_.reset();
        });
    }
    Mounted(const Mounted&) = delete;
    Mounted& operator=(const Mounted&) = delete;
    ~Mounted() {
        if (thread_.joinable()) static_cast<void>(stop());
    }

    [[nodiscard]] std::string path() const { return directory_ / "mounted"; }
    [[nodiscard]] std::string operator/(const std::string& name) const { return path() + "/" + name; }

    Result<void> stop() {
        mount_->stop();
        return wait();
    }
    Result<void> wait() {
        thread_.join();
        return result_;
    }
    [[nodiscard]] std::vector<Error> failures() {
        const std::lock_guard lock(mutex_);
        return failures_;
    }

private:
    TemporaryDirectory directory_;
    std::unique_ptr<Mount> mount_;
    Result<void> result_;
    std::mutex mutex_;
    std::vector<Error> failures_;
    std::thread thread_;
};

std::string text(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::shared_ptr<TestDisk> filled_disk(std::uint64_t size, const char* name) {
    auto disk = std::make_shared<TestDisk>(size);
    auto random = Random::named(name);
    disk->fill(random);
    return disk;
}

TEST_F(MountTest, TheFileHasTheSizeAndTheContentsOfTheDisk) {
    const auto disk = filled_disk(3 * MiB + 700, "mount contents");
    {
        Mounted mounted(disk);
        const auto whole = read_file(mounted.path());
        ASSERT_TRUE(whole == text(disk->bytes()));
        const OpenFile file(mounted.path());
        EXPECT_EQ(file.read(3 * MiB + 690, 100), whole.substr(3 * MiB + 690));
        EXPECT_EQ(file.read(4 * MiB, 100), "");
        struct stat status = {};
        ASSERT_EQ(fstat(file.fd(), &status), 0);
        EXPECT_EQ(status.st_size, off_t{3 * MiB + 700});
        EXPECT_TRUE(S_ISREG(status.st_mode));
        EXPECT_EQ(status.st_mode & 0777, 0644U);
        EXPECT_LT(status.st_blocks * 512, status.st_size);
        EXPECT_TRUE(mounted.stop());
        EXPECT_EQ(read_file(mounted.path()), "hidden");
    }
}

TEST_F(MountTest, ManyThreadsReadAndWriteDirectlyAndBuffered) {
    constexpr std::size_t slice = 2 * MiB;
    constexpr unsigned threads = 6;
    const auto disk = filled_disk(threads * slice, "mount threads");
    auto expected = text(disk->bytes());
    Mounted mounted(disk);
    std::vector<std::thread> running;
    std::atomic<unsigned> wrong = 0;
    for (unsigned t = 0; t < threads; ++t) {
        running.emplace_back([&, t] {
            Random random(t + 1);
            const bool direct = t % 2 == 0;
            const OpenFile file(mounted.path(), O_RDWR | (direct ? O_DIRECT : 0));
            const PageMemory memory(slice);
            const std::uint64_t unit = direct ? 4096 : 1;
            for (int i = 0; i < 60; ++i) {
                const auto length = random.between(1, slice / 2 / unit) * unit;
                const auto at = t * slice + random.below((slice - length) / unit + 1) * unit;
                auto* const bytes = reinterpret_cast<char*>(memory.data());
                if (random.chance(50)) {
                    const auto data = random.bytes(length);
                    std::memcpy(bytes, data.data(), length);
                    if (pwrite(file.fd(), bytes, length, static_cast<off_t>(at)) != static_cast<ssize_t>(length))
                        ++wrong;
                    std::memcpy(expected.data() + at, data.data(), length);
                } else {
                    if (pread(file.fd(), bytes, length, static_cast<off_t>(at)) != static_cast<ssize_t>(length) ||
                        std::memcmp(bytes, expected.data() + at, length) != 0)
                        ++wrong;
                }
            }
        });
    }
    for (auto& thread : running) thread.join();
    EXPECT_EQ(wrong, 0U);
    EXPECT_TRUE(mounted.stop());
    EXPECT_TRUE(text(disk->bytes()) == expected);
}

TEST_F(MountTest, OnlyFsyncFlushes) {
    const auto disk = std::make_shared<TestDisk>(1 * MiB);
    Mounted mounted(disk);
    {
        const OpenFile file(mounted.path());
        EXPECT_EQ(file.write(4096, std::string(4096, 'a')), 4096);
        EXPECT_EQ(text(disk->bytes().subspan(4096, 4096)), std::string(4096, 'a'));
    }
    EXPECT_EQ(disk->flushes, 0U);
    const OpenFile file(mounted.path());
    EXPECT_EQ(fsync(file.fd()), 0);
    EXPECT_EQ(disk->flushes, 1U);
    EXPECT_EQ(fdatasync(file.fd()), 0);
    EXPECT_EQ(disk->flushes, 2U);
    disk->flush_fails = true;
    EXPECT_EQ(fsync(file.fd()), -1);
    EXPECT_EQ(errno, ENOSPC);
    EXPECT_TRUE(fails(mounted.stop(), Errc::no_space));
}

TEST_F(MountTest, FallocateMakesZeros) {
    const auto disk = filled_disk(1 * MiB, "mount fallocate");
    Mounted mounted(disk);
    const OpenFile file(mounted.path());
    const auto before = file.read(0, 1 * MiB);
    EXPECT_EQ(file.allocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 1000, 70000), 0);
    EXPECT_EQ(disk->released, 1U);
    EXPECT_EQ(disk->kept, 0U);
    EXPECT_EQ(file.allocate(FALLOC_FL_ZERO_RANGE, 200000, 1000), 0);
    EXPECT_EQ(file.allocate(FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 1 * MiB - 10, 1000), 0);
    EXPECT_EQ(disk->kept, 2U);
    EXPECT_EQ(disk->released, 1U);
    auto expected = before;
    for (const auto& [at, length] : {std::pair{1000, 70000}, {200000, 1000}, {1 * MiB - 10, 10}})
        expected.replace(static_cast<std::size_t>(at), static_cast<std::size_t>(length),
                         static_cast<std::size_t>(length), '\0');
    EXPECT_TRUE(file.read(0, 1 * MiB) == expected);
    EXPECT_TRUE(text(disk->bytes()) == expected);
    EXPECT_EQ(file.allocate(0, 0, 4096), EOPNOTSUPP);
    for (const int mode : {FALLOC_FL_KEEP_SIZE, FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE,
                           FALLOC_FL_UNSHARE_RANGE, FALLOC_FL_PUNCH_HOLE})
        EXPECT_EQ(file.allocate(mode, 0, 4096), EOPNOTSUPP) << mode;
    EXPECT_EQ(file.allocate(FALLOC_FL_ZERO_RANGE, 1 * MiB - 10, 1000), EOPNOTSUPP);
    EXPECT_EQ(file.allocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 2 * MiB, 1000), 0);
}

TEST_F(MountTest, SeekFindsHoles) {
    const auto disk = filled_disk(4 * TestDisk::block + 100, "mount seek");
    disk->punch(0);
    disk->punch(2 * TestDisk::block);
    disk->punch(3 * TestDisk::block);
    Mounted mounted(disk);
    const OpenFile file(mounted.path());
    const auto seek = [&](std::uint64_t from, int whence) {
        return lseek(file.fd(), static_cast<off_t>(from), whence);
    };
    constexpr off_t block = TestDisk::block;
    EXPECT_EQ(seek(0, SEEK_DATA), block);
    EXPECT_EQ(seek(0, SEEK_HOLE), 0);
    EXPECT_EQ(seek(block + 5, SEEK_DATA), block + 5);
    EXPECT_EQ(seek(block + 5, SEEK_HOLE), 2 * block);
    EXPECT_EQ(seek(2 * block + 5, SEEK_DATA), 4 * block);
    EXPECT_EQ(seek(4 * block, SEEK_HOLE), 4 * block + 100);
    EXPECT_EQ(seek(4 * block + 100, SEEK_DATA), -1);
    EXPECT_EQ(errno, ENXIO);
    disk->punch(4 * TestDisk::block);
    EXPECT_EQ(seek(2 * block, SEEK_DATA), -1);
    EXPECT_EQ(errno, ENXIO);
}

TEST_F(MountTest, TheSizeIsFixed) {
    const auto disk = filled_disk(100'000, "mount size");
    Mounted mounted(disk);
    const OpenFile file(mounted.path());
    EXPECT_EQ(ftruncate(file.fd(), 100'000), 0);
    for (const off_t size : {0, 99'999, 100'001}) {
        EXPECT_EQ(ftruncate(file.fd(), size), -1);
        EXPECT_EQ(errno, EOPNOTSUPP);
    }
    EXPECT_EQ(errno_of_open(mounted.path(), O_RDWR | O_TRUNC), EOPNOTSUPP);
    EXPECT_EQ(file.write(100'000 - 3, "abcdef"), 3);
    EXPECT_EQ(file.write(100'000, "abcdef"), -ENOSPC);
    EXPECT_EQ(file.write(200'000, "abcdef"), -ENOSPC);
    EXPECT_EQ(file.read(100'000 - 3, 10), "abc");
    struct stat status = {};
    ASSERT_EQ(stat(mounted.path().c_str(), &status), 0);
    EXPECT_EQ(status.st_size, 100'000);
    EXPECT_EQ(fchmod(file.fd(), 0777), -1);
    const auto failures = mounted.failures();
    ASSERT_EQ(failures.size(), 1U);
    EXPECT_THAT(failures.front().message(), testing::HasSubstr("qcow resize"));
}

TEST_F(MountTest, MappedMemoryIsTheDiskAlsoAtTheEnd) {
    const auto disk = filled_disk(1 * MiB, "mount mmap");
    Mounted mounted(disk);
    {
        const OpenFile file(mounted.path());
        auto* const mapped =
            static_cast<char*>(mmap(nullptr, 1 * MiB, PROT_READ | PROT_WRITE, MAP_SHARED, file.fd(), 0));
        ASSERT_NE(mapped, MAP_FAILED);
        EXPECT_EQ(std::memcmp(mapped, disk->bytes().data(), 1 * MiB), 0);
        std::memcpy(mapped + 5000, "synchronised", 12);
        EXPECT_EQ(msync(mapped, 1 * MiB, MS_SYNC), 0);
        EXPECT_EQ(text(disk->bytes().subspan(5000, 12)), "synchronised");
        std::memcpy(mapped + 9000, "not so", 6);
        EXPECT_TRUE(mounted.stop());
        EXPECT_EQ(text(disk->bytes().subspan(9000, 6)), "not so");
        munmap(mapped, 1 * MiB);
    }
}

/// A disk without space.
class FullDisk final : public Disk {
public:
    [[nodiscard]] std::uint64_t size() const override { return 1 * MiB; }
    [[nodiscard]] std::uint64_t block_size() const override { return 4096; }

protected:
    Result<void> do_read(GuestOffset, Buffers) override { return fail(Errc::corrupt, "disk", "unreadable"); }
    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override {
        Extent extent;
        extent.start = at;
        extent.length = limit;
        return extent;
    }
    [[nodiscard]] Result<void> verify_writable() const override { return {}; }
    Result<void> do_write(GuestOffset, ConstBuffers from) override {
        if (from.empty()) return {};
        return fail(Errc::no_space, "disk", "full");
    }
    Result<void> do_flush() override { return {}; }
};

TEST_F(MountTest, ErrorsOfTheDiskBecomeErrnos) {
    Mounted mounted(std::make_shared<FullDisk>());
    const OpenFile file(mounted.path(), O_RDWR | O_DIRECT);
    const PageMemory memory(4096);
    std::memset(memory.data(), 1, 4096);
    for (int i = 0; i < 2; ++i) {
        EXPECT_EQ(pwrite(file.fd(), memory.data(), 4096, 0), -1);
        EXPECT_EQ(errno, ENOSPC);
        EXPECT_EQ(pread(file.fd(), memory.data(), 4096, 0), -1);
        EXPECT_EQ(errno, EIO);
    }
    const auto failures = mounted.failures();
    ASSERT_EQ(failures.size(), 2U);  // each kind once
    EXPECT_EQ(failures[0].message(), "disk: full");
    EXPECT_EQ(failures[1].message(), "disk: unreadable");
}

TEST_F(MountTest, AReadOnlyMountRefusesWriters) {
    const auto disk = filled_disk(1 * MiB, "mount read-only");
    Mounted mounted(disk, On::file, {.read_only = true});
    EXPECT_EQ(errno_of_open(mounted.path(), O_RDWR), EROFS);
    EXPECT_TRUE(read_file(mounted.path()) == text(disk->bytes()));
    struct stat status = {};
    ASSERT_EQ(stat(mounted.path().c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 0222, 0U);
    EXPECT_TRUE(mounted.stop());
    EXPECT_EQ(disk->flushes, 0U);
}

TEST_F(MountTest, OneThreadIsEnoughAndASlowDiskGetsMore) {
    const auto disk = std::make_shared<TestDisk>(4 * MiB);
    for (const unsigned threads : {1U, 0U}) {
        disk->delay_microseconds = threads == 1 ? 0 : 500;
        disk->most_inside = 0;
        Mounted mounted(disk, On::file, {.threads = threads});
        std::vector<std::thread> readers;
        for (unsigned t = 0; t < 8; ++t) {
            readers.emplace_back([&, t] {
                const OpenFile file(mounted.path(), O_RDONLY | O_DIRECT);
                const PageMemory memory(4096);
                for (off_t i = 0; i < 100; ++i)
                    EXPECT_EQ(pread(file.fd(), memory.data(), 4096, 4096 * (100 * t + i)), 4096);
            });
        }
        for (auto& reader : readers) reader.join();
        const unsigned inside = disk->most_inside;
        EXPECT_EQ(inside == 1, threads == 1) << inside;
        EXPECT_EQ(inside > std::max(2U, std::thread::hardware_concurrency()), threads == 0) << inside;
        EXPECT_TRUE(mounted.stop());
    }
}

TEST_F(MountTest, SomebodyElseUnmounts) {
    const auto disk = std::make_shared<TestDisk>(1 * MiB);
    Mounted mounted(disk);
    EXPECT_EQ(OpenFile(mounted.path()).write(0, "x"), 1);
    ASSERT_EQ(umount2(mounted.path().c_str(), 0), 0);
    EXPECT_TRUE(mounted.wait());
    EXPECT_EQ(disk->flushes, 1U);
}

TEST_F(MountTest, AMountThatDoesNotRunIsUnmounted) {
    const TemporaryDirectory directory;
    write_file(directory / "file", "hidden");
    must(Mount::make(std::make_shared<TestDisk>(4096), directory / "file"));
    EXPECT_EQ(read_file(directory / "file"), "hidden");
}

TEST_F(MountTest, RefusesOtherMountPoints) {
    const TemporaryDirectory directory;
    const auto disk = std::make_shared<TestDisk>(4096);
    EXPECT_TRUE(fails(Mount::make(disk, directory / "nothing"), Errc::not_found, {"nothing", "touch", "mkdir"}));
    write_file(directory / "file", "");
    EXPECT_TRUE(fails(Mount::make(disk, directory.path()), Errc::invalid_argument, {"not empty"}));
    ASSERT_EQ(mkfifo((directory / "fifo").c_str(), 0600), 0);
    EXPECT_TRUE(fails(Mount::make(disk, directory / "fifo"), Errc::invalid_argument, {"neither"}));
}

TEST_F(MountTest, FilesOfADirectoryShowEachOthersWritesAtOnce) {
    const auto disk = filled_disk(4 * MiB, "mount directory");
    // A master boot record with the partitions 1 and 3. The third one reaches past the end.
    std::fill_n(disk->bytes().begin(), 512, std::byte{0});
    const auto entry = [&](std::size_t index, std::uint32_t start, std::uint32_t sectors) {
        auto* const at = disk->bytes().data() + 446 + 16 * index;
        at[4] = std::byte{0x83};
        std::memcpy(at + 8, &start, 4);
        std::memcpy(at + 12, &sectors, 4);
    };
    entry(0, 2048, 2048);
    entry(2, 4096, 10000);
    disk->bytes()[510] = std::byte{0x55};
    disk->bytes()[511] = std::byte{0xaa};
    Mounted mounted(disk, On::directory);
    const auto names = [&](const std::string& path) {
        std::vector<std::string> result;
        for (const auto& found : std::filesystem::directory_iterator(path)) result.push_back(found.path().filename());
        std::ranges::sort(result);
        return result;
    };
    EXPECT_THAT(names(mounted.path()), testing::ElementsAre("disk", "partitions", "snapshots"));
    EXPECT_THAT(names(mounted / "partitions"), testing::ElementsAre("1", "3"));
    EXPECT_THAT(names(mounted / "snapshots"), testing::IsEmpty());
    EXPECT_EQ(errno_of_open(mounted / "nothing", O_RDONLY), ENOENT);
    EXPECT_EQ(errno_of_open(mounted / "new", O_RDWR | O_CREAT), ENOSYS);

    const OpenFile whole(mounted / "disk");
    const OpenFile part(mounted / "partitions/1");
    EXPECT_TRUE(read_file(mounted / "disk") == text(disk->bytes()));
    EXPECT_TRUE(part.read(0, 4 * MiB) == text(disk->bytes().subspan(1 * MiB, 1 * MiB)));
    EXPECT_EQ(part.write(10, "by the partition"), 16);
    EXPECT_EQ(whole.read(1 * MiB + 10, 16), "by the partition");
    EXPECT_EQ(whole.write(1 * MiB + 5000, "by the disk"), 11);
    EXPECT_EQ(part.read(5000, 11), "by the disk");
    EXPECT_EQ(part.write(1 * MiB, "x"), -ENOSPC);
    EXPECT_EQ(std::filesystem::file_size(mounted / "partitions/3"), 2 * MiB);
    EXPECT_EQ(fsync(part.fd()), 0);
    EXPECT_EQ(disk->flushes, 1U);
}

TEST(SnapshotFileNameTest, IsSafe) {
    EXPECT_EQ(snapshot_file_name("before upgrade"), "before upgrade");
    EXPECT_EQ(snapshot_file_name("../x/100%"), "%2E.%2Fx%2F100%25");
    EXPECT_EQ(snapshot_file_name("Größe"), "Größe");
    EXPECT_EQ(snapshot_file_name("Gr\xf6\n"), "Gr%F6%0A");
    EXPECT_EQ(snapshot_file_name(""), "");
    EXPECT_EQ(snapshot_file_name(std::string(255, 'a')), std::string(255, 'a'));
    EXPECT_EQ(snapshot_file_name(std::string(254, 'a') + "/"), "");
}

}  // namespace
}  // namespace qcow::test
