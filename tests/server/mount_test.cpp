// Disks that are mounted as files. The disk of most tests is in this process, and so are the programs that use the
// file.

#include "qcow/mount.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/falloc.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

#include "base/bits.h"
#include "base/page_memory.h"
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

class OpenFile {
public:
    explicit OpenFile(const std::string& path, int flags = O_RDWR) : fd_(open(path.c_str(), flags | O_CLOEXEC)) {
        if (fd_.get() < 0) throw std::runtime_error(path + ": " + std::strerror(errno));
    }
    [[nodiscard]] int fd() const { return fd_.get(); }

    [[nodiscard]] std::string read(std::uint64_t at, std::size_t length) const {
        std::string bytes(length, '?');
        const auto count = pread(fd(), bytes.data(), length, static_cast<off_t>(at));
        if (count < 0) throw std::runtime_error(std::strerror(errno));
        bytes.resize(static_cast<std::size_t>(count));
        return bytes;
    }
    /// Returns the bytes written, or minus the errno.
    [[nodiscard]] ssize_t write(std::uint64_t at, const std::string& bytes) const {
        const auto count = pwrite(fd(), bytes.data(), bytes.size(), static_cast<off_t>(at));
        return count < 0 ? -errno : count;
    }
    [[nodiscard]] int allocate(int mode, off_t at, off_t length) const {
        return fallocate(fd(), mode, at, length) == 0 ? 0 : errno;
    }

private:
    FileDescriptor fd_;
};

int errno_of_open(const std::string& path, int flags) {
    const FileDescriptor fd(open(path.c_str(), flags | O_CLOEXEC));
    return fd.get() >= 0 ? 0 : errno;
}

std::string text(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::shared_ptr<TestDisk> filled_disk(std::uint64_t size, const char* name) {
    auto disk = std::make_shared<TestDisk>(size);
    auto random = Random::named(name);
    disk->fill(random);
    return disk;
}

class MountTest : public testing::Test {
protected:
    void SetUp() override {
        if (access("/dev/fuse", F_OK) != 0) GTEST_SKIP() << "this system has no /dev/fuse";
        if (geteuid() != 0) GTEST_SKIP() << "only root can mount everywhere";
        const auto without = Mount::make(std::make_shared<TestDisk>(0), "/nowhere");
        if (without.error().code == Errc::unsupported) GTEST_SKIP() << without.error().message();
        const TemporaryDirectory directory;
        std::ofstream(directory.file("point"));
        const auto mount = Mount::make(std::make_shared<TestDisk>(4096), directory.file("point"));
        if (!mount && mount.error().code == Errc::access_denied) GTEST_SKIP() << mount.error().message();
    }
};

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

// ---- The command ----

class MountToolTest : public MountTest {
protected:
    void TearDown() override {
        command_.reset();
        umount2((directory_ / "mounted").c_str(), MNT_DETACH);
    }

    [[nodiscard]] Finished tool(Arguments arguments) const {
        arguments.insert(arguments.begin(), QCOW_TOOL);
        return run(arguments, directory_.path());
    }
    void must_tool(const Arguments& arguments) const {
        const auto finished = tool(arguments);
        ASSERT_EQ(finished.status, 0) << finished.text();
    }

    void mount(Arguments options = {}, const std::string& target = "mounted") {
        if (!std::filesystem::exists(directory_ / target)) write_file(directory_ / target, "");
        options.insert(options.begin(), {QCOW_TOOL, "mount"});
        options.insert(options.end(), {"disk.qcow2", target});
        command_ = std::make_unique<Subprocess>(options, directory_.path());
        command_->wait_for("mounted disk.qcow2 on " + target);
    }

    Finished end(int signal) {
        command_->signal(signal);
        auto finished = command_->finish();
        command_.reset();
        return finished;
    }

    void expect_clean() const {
        const auto checked = tool({"check", "disk.qcow2"});
        EXPECT_EQ(checked.status, 0) << checked.text();
        const auto theirs = qemu_img({"check", "disk.qcow2"}, directory_.path());
        EXPECT_EQ(theirs.status, 0) << theirs.text();
    }

    /// Starts fio on the mounted file: jobs that write for a long time. Waits until they write.
    [[nodiscard]] std::unique_ptr<Subprocess> load() const {
        const auto before = std::filesystem::last_write_time(directory_ / "mounted");
        auto fio = std::make_unique<Subprocess>(
            Arguments{"fio", "--name=load", "--filename=mounted", "--size=32m", "--rw=randwrite", "--bsrange=512-64k",
                      "--ioengine=libaio", "--iodepth=8", "--numjobs=2", "--thread", "--fsync=20", "--time_based",
                      "--runtime=60", "--fallocate=none"},
            directory_.path());
        for (int i = 0; i < 1000 && std::filesystem::last_write_time(directory_ / "mounted") == before; ++i)
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        return fio;
    }

    TemporaryDirectory directory_;
    std::unique_ptr<Subprocess> command_;
};

TEST_F(MountToolTest, FioVerifiesAndQemuSeesTheSame) {
    must_tool({"create", "-q", "disk.qcow2", "64M"});
    mount({"--pid-file", "pid"});
    EXPECT_TRUE(std::filesystem::exists(directory_ / "pid"));
    for (const auto* const how : {"--direct=1", "--direct=0"}) {
        const auto verified =
            run({"fio", "--name=job", "--filename=mounted", "--size=16m", "--offset_increment=16m", "--numjobs=4",
                 "--rw=randwrite", "--bsrange=4k-128k", "--ioengine=libaio", "--iodepth=16", "--verify=crc32c",
                 "--do_verify=1", "--thread", "--fallocate=none", how},
                directory_.path());
        EXPECT_EQ(verified.status, 0) << verified.text();
    }
    const OpenFile file(directory_ / "mounted");
    EXPECT_EQ(file.allocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 1 * MiB, 1 * MiB), 0);
    EXPECT_EQ(lseek(file.fd(), 0, SEEK_HOLE), off_t{1 * MiB});
    must_run({"cp", "--sparse=always", "mounted", "copy"}, directory_.path());
    EXPECT_EQ(end(SIGTERM).status, 0);
    EXPECT_FALSE(std::filesystem::exists(directory_ / "pid"));
    EXPECT_EQ(qemu_img({"compare", "-f", "raw", "-F", "qcow2", "copy", "disk.qcow2"}, directory_.path()).status, 0);
    const auto map = qemu_img_json({"map", "--output=json", "disk.qcow2"}, directory_.path());
    const auto hole = std::ranges::find_if(map, [](const auto& run) { return run["start"] == 1 * MiB; });
    ASSERT_NE(hole, map.end());
    EXPECT_EQ((*hole)["length"], 1 * MiB);
    EXPECT_EQ((*hole)["data"], false);
    expect_clean();
}

TEST_F(MountToolTest, SignalsUnderLoadUnmountAndCloseTheImage) {
    must_tool({"create", "-q", "disk.qcow2", "32M"});
    for (const int signal : {SIGTERM, SIGINT}) {
        mount();
        const auto fio = load();
        const auto finished = end(signal);
        EXPECT_EQ(finished.status, 0) << finished.text();
        EXPECT_NE(fio->finish().status, 0);
        EXPECT_EQ(std::filesystem::file_size(directory_ / "mounted"), 0U);
        expect_clean();
    }
}

TEST_F(MountToolTest, KilledUnderLoadItLeavesASoundImage) {
    must_tool({"create", "-q", "disk.qcow2", "32M"});
    for (int i = 0; i < 2; ++i) {
        mount();
        const auto fio = load();
        EXPECT_EQ(end(SIGKILL).status, 128 + SIGKILL);
        fio->finish();
        const auto refused = tool({"mount", "disk.qcow2", "mounted"});
        EXPECT_EQ(refused.status, 1);
        EXPECT_THAT(refused.err, testing::HasSubstr("fusermount3 -u"));
        ASSERT_EQ(umount2((directory_ / "mounted").c_str(), MNT_DETACH), 0);
        const auto checked = tool({"check", "disk.qcow2"});
        EXPECT_TRUE(checked.status == 0 || checked.status == 3) << checked.text();  // 3: leaks
    }
}

TEST_F(MountToolTest, OnItsOwnImage) {
    must_tool({"create", "-q", "disk.qcow2", "1M"});
    mount({}, "disk.qcow2");
    EXPECT_EQ(OpenFile(directory_ / "disk.qcow2").write(0, "guest"), 5);
    EXPECT_EQ(std::filesystem::file_size(directory_ / "disk.qcow2"), 1 * MiB);
    EXPECT_EQ(end(SIGTERM).status, 0);
    EXPECT_THAT(tool({"read", "disk.qcow2", "0", "5"}).out, testing::HasSubstr("guest"));
    expect_clean();
}

TEST_F(MountToolTest, SnapshotsStayWhatTheyWereWhileTheDiskIsWritten) {
    must_tool({"create", "-q", "disk.qcow2", "4M"});
    must_qemu_io("disk.qcow2", "qcow2", {"write -P 1 0 4M"}, directory_.path());
    must_tool({"snapshot", "-c", "a/b", "disk.qcow2"});
    must_tool({"snapshot", "-c", "second", "disk.qcow2"});
    must_tool({"snapshot", "-c", "second", "disk.qcow2"});
    std::filesystem::create_directory(directory_ / "mounted");
    mount();
    const std::string ones(4 * MiB, '\1');
    {
        const OpenFile disk(directory_ / "mounted/disk");
        EXPECT_EQ(disk.write(1 * MiB, std::string(1 * MiB, '\2')), ssize_t{1 * MiB});
        EXPECT_TRUE(read_file(directory_ / "mounted/snapshots/a%2Fb") == ones);
        EXPECT_TRUE(read_file(directory_ / "mounted/snapshots/second") == ones);
        EXPECT_TRUE(read_file(directory_ / "mounted/snapshots/%id=3") == ones);
        EXPECT_TRUE(disk.read(1 * MiB, 1 * MiB) == std::string(1 * MiB, '\2'));
        EXPECT_EQ(errno_of_open(directory_ / "mounted/snapshots/second", O_RDWR), EROFS);
    }
    EXPECT_EQ(run({"umount", directory_ / "mounted"}).status, 0);
    EXPECT_EQ(command_->finish().status, 0);
    expect_clean();
}

TEST_F(MountToolTest, AFileSystemOfTheKernelOnALoopDevice) {
    must_tool({"create", "-q", "disk.qcow2", "64M"});
    mount();
    const auto loop = run({"losetup", "--find", "--show", directory_ / "mounted"});
    if (loop.status != 0) GTEST_SKIP() << loop.text();
    const auto device = loop.out.substr(0, loop.out.size() - 1);
    must_run({"mkfs.ext4", "-q", "-F", device});
    const auto tree = directory_ / "tree";
    std::filesystem::create_directory(tree);
    const auto mounted = run({"mount", "-t", "ext4", "-o", "discard", device, tree});
    Random random(3);
    const auto content = random.bytes(5 * MiB);
    if (mounted.status == 0) {
        write_file(tree + "/kept", content);
        write_file(tree + "/removed", content);
        std::filesystem::remove(tree + "/removed");
        must_run({"umount", tree});
    }
    must_run({"losetup", "--detach", device});
    // The kernel lets go of the file a little later.
    Finished unmounted;
    for (int i = 0; i < 1500 && (unmounted = run({"umount", directory_ / "mounted"})).status != 0; ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_EQ(unmounted.status, 0) << unmounted.text();
    EXPECT_EQ(command_->finish().status, 0);
    expect_clean();
    if (mounted.status != 0) GTEST_SKIP() << mounted.text();
    qemu_convert_to_raw("disk.qcow2", "qcow2", "raw", {}, directory_.path());
    const auto checked = run({"e2fsck", "-fn", "raw"}, directory_.path());
    EXPECT_EQ(checked.status, 0) << checked.text();
    EXPECT_TRUE(tool({"cat", "disk.qcow2", "/kept"}).out == content);
}

TEST_F(MountToolTest, RefusesWhatMakesNoSense) {
    must_tool({"create", "-q", "disk.qcow2", "1M"});
    const auto refused = [&](const Arguments& arguments, const std::string& why) {
        const auto finished = tool(arguments);
        EXPECT_EQ(finished.status, 1) << finished.text();
        EXPECT_THAT(finished.err, testing::HasSubstr(why));
    };
    refused({"mount", "disk.qcow2", "nothing"}, "make an empty file (touch)");
    refused({"mount", "disk.qcow2", "."}, "not empty");
    write_file(directory_ / "file", "");
    refused({"mount", "--force-share", "disk.qcow2", "file"}, "two writers");
    refused({"mount", "--pid-file", "disk.qcow2", "disk.qcow2", "file"}, "the image");
    refused({"mount", "--snapshot", "none", "disk.qcow2", "file"}, "none");
}

}  // namespace
}  // namespace qcow::test
