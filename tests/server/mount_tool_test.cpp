// qcow mount as its users start it: programs that use the files, signals, and its sandbox.

#include <fcntl.h>
#include <fmt/format.h>
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
#include <array>
#include <csignal>
#include <cstring>
#include <thread>

#include "base/bits.h"
#include "base/page_memory.h"
#include "server/mounted_file.h"
#include "support/disks.h"
#include "support/effort.h"
#include "support/qemu.h"
#include "support/random.h"
#include "support/temporary_directory.h"

namespace qcow::test {
namespace {

class MountToolTest : public MountTest {
protected:
    void TearDown() override {
        command_.reset();
        umount2((directory_ / "mounted").c_str(), MNT_DETACH);
    }

    /// The process ID of the command: that of its PID file.
    [[nodiscard]] int pid() const { return std::stoi(read_file(directory_ / "pid")); }

    /// Of the process that unmounts.
    [[nodiscard]] int unmounter() const {
        return std::stoi(read_file(fmt::format("/proc/{0}/task/{0}/children", pid())));
    }

    /// Another process does that when this one has died.
    void wait_until_unmounted() const {
        struct statfs status = {};
        const auto is_fuse = [&] {
            return statfs((directory_ / "mounted").c_str(), &status) != 0 || status.f_type == FUSE_SUPER_MAGIC;
        };
        for (int i = 0; i < 3000 && is_fuse(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
        EXPECT_FALSE(is_fuse());
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
        options.insert(options.begin(), {QCOW_TOOL, "mount", "--pid-file", "pid"});
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
    mount();
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
        wait_until_unmounted();
        const auto checked = tool({"check", "disk.qcow2"});
        EXPECT_TRUE(checked.status == 0 || checked.status == 3) << checked.text();  // 3: leaks
    }
}

TEST_F(MountToolTest, ADeadMountIsNamed) {
    must_tool({"create", "-q", "disk.qcow2", "1M"});
    mount();
    ASSERT_EQ(kill(unmounter(), SIGKILL), 0);
    EXPECT_EQ(end(SIGKILL).status, 128 + SIGKILL);
    const auto refused = tool({"mount", "disk.qcow2", "mounted"});
    EXPECT_EQ(refused.status, 1);
    EXPECT_THAT(refused.err, testing::HasSubstr("fusermount3 -u"));
}

TEST_F(MountToolTest, WithoutTheProcessThatUnmountsEverythingIsFlushed) {
    must_tool({"create", "-q", "disk.qcow2", "1M"});
    mount();
    EXPECT_EQ(OpenFile(directory_ / "mounted").write(0, "guest"), 5);
    ASSERT_EQ(kill(unmounter(), SIGKILL), 0);
    const auto finished = end(SIGTERM);
    EXPECT_EQ(finished.status, 0);
    EXPECT_THAT(finished.err, testing::HasSubstr("fusermount3 -u"));
    EXPECT_THAT(tool({"read", "disk.qcow2", "0", "5"}).out, testing::HasSubstr("guest"));
    expect_clean();
}

TEST_F(MountToolTest, MemoryThatIsMappedReachesTheImageAtTheEnd) {
    must_tool({"create", "-q", "disk.qcow2", "1M"});
    mount();
    const OpenFile file(directory_ / "mounted");
    auto* const mapped = static_cast<char*>(mmap(nullptr, 1 * MiB, PROT_READ | PROT_WRITE, MAP_SHARED, file.fd(), 0));
    ASSERT_NE(mapped, MAP_FAILED);
    std::memcpy(mapped + 9000, "by memory", 9);
    EXPECT_EQ(end(SIGTERM).status, 0);
    EXPECT_THAT(tool({"read", "disk.qcow2", "9000", "9"}).out, testing::HasSubstr("by memory"));
    munmap(mapped, 1 * MiB);
    EXPECT_EQ(file.write(0, "x"), -ENOTCONN);
    expect_clean();
}

TEST_F(MountToolTest, EverythingInTheSandbox) {
    must_tool({"create", "-q", "disk.qcow2", "4M"});
    must_tool({"snapshot", "-c", "first", "disk.qcow2"});
    std::filesystem::create_directory(directory_ / "mounted");
    mount();
    const auto seccomp = read_file(fmt::format("/proc/{}/status", pid()));
    {
        const OpenFile disk(directory_ / "mounted/disk");
        EXPECT_EQ(disk.write(5000, "guest"), 5);
        EXPECT_EQ(fsync(disk.fd()), 0);
        EXPECT_EQ(disk.allocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 1 * MiB, 1 * MiB), 0);
        EXPECT_EQ(disk.allocate(FALLOC_FL_ZERO_RANGE, 2 * MiB, 1 * MiB), 0);
        EXPECT_EQ(lseek(disk.fd(), 1 * MiB, SEEK_HOLE), off_t{1 * MiB});
        EXPECT_EQ(ftruncate(disk.fd(), 0), -1);
        EXPECT_EQ(read_file(directory_ / "mounted/snapshots/first").size(), 4 * MiB);
    }
    const auto finished = end(SIGTERM);
    EXPECT_EQ(finished.status, 0) << finished.text();
    EXPECT_FALSE(std::filesystem::exists(directory_ / "pid"));
    expect_clean();
    if (finished.err.find("sandbox: Landlock, seccomp\n") == std::string::npos) GTEST_SKIP() << finished.text();
    EXPECT_THAT(seccomp, testing::HasSubstr("Seccomp:\t2"));
}

TEST_F(MountToolTest, WithoutASandboxAndAsAnotherUser) {
    must_tool({"create", "-q", "disk.qcow2", "1M"});
    mount({"--sandbox=off", "--user", "nobody"});
    EXPECT_THAT(read_file(fmt::format("/proc/{}/status", pid())), testing::HasSubstr("Seccomp:\t0"));
    struct stat status = {};
    ASSERT_EQ(stat(fmt::format("/proc/{}", pid()).c_str(), &status), 0);
    EXPECT_EQ(OpenFile(directory_ / "mounted").write(0, "guest"), 5);
    const auto finished = end(SIGTERM);
    EXPECT_EQ(finished.status, 0);
    EXPECT_THAT(finished.err, testing::HasSubstr("sandbox: off, user nobody"));
    expect_clean();
}

/// The same operations on the mounted file and on one of the system's, in memory that both map.
class SameOperations {
public:
    SameOperations(const std::string& mounted, const std::string& other, std::uint64_t size)
        : size_(size), files_{Side(mounted, size), Side(other, size)} {}

    void perform(Random& random) {
        const auto page = random.below(size_ / 4096) * 4096;
        const auto at = random.below(size_);
        const auto length = random.between(1, std::min<std::uint64_t>(size_ - at, 150'000));
        const auto content = random.bytes(length);
        const auto kind = random.below(9);
        SCOPED_TRACE(fmt::format("operation {} of {} bytes at {}", kind, length, at));
        switch (kind) {
            case 0:
            case 1: return both([&](Side& side) { return side.buffered.write(at, content); });
            case 2: return both([&](Side& side) { return side.write_page(page, content); });
            case 3: return both([&](Side& side) { return side.read_page(page); });
            case 4:
                return both([&](Side& side) {
                    std::memcpy(side.mapped + at, content.data(), length);
                    return 0;
                });
            case 5: return both([&](Side& side) { return std::string(side.mapped + at, length); });
            case 6: return both([&](Side& side) { return side.buffered.read(at, length); });
            case 7:
                return both([&](Side& side) {
                    return side.buffered.allocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(at),
                                                  static_cast<off_t>(length));
                });
            default:
                // Not every file system can make a range zeros, which holes are, too.
                return both([&](Side& side) {
                    const int mode =
                        &side == &files_[0] ? FALLOC_FL_ZERO_RANGE : FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
                    return side.buffered.allocate(mode, static_cast<off_t>(at), static_cast<off_t>(length)) +
                           fsync(side.buffered.fd());
                });
        }
    }

    /// Every hole that is found reads as zeros. The kernel does not look into memory that is mapped and not
    /// synchronised.
    void expect_holes_of_zeros() const {
        const int fd = files_[0].buffered.fd();
        EXPECT_EQ(fsync(fd), 0);
        for (off_t at = 0; (at = lseek(fd, at, SEEK_HOLE)) >= 0 && at < static_cast<off_t>(size_);) {
            auto end = lseek(fd, at, SEEK_DATA);
            if (end < 0) end = static_cast<off_t>(size_);
            const auto bytes =
                files_[0].buffered.read(static_cast<std::uint64_t>(at), static_cast<std::size_t>(end - at));
            EXPECT_EQ(bytes.find_first_not_of('\0'), std::string::npos) << at;
            at = end;
        }
    }

private:
    struct Side {
        Side(const std::string& path, std::uint64_t size)
            : buffered(path),
              direct(path, O_RDWR | O_DIRECT),
              mapped(static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, buffered.fd(), 0))),
              bytes(size) {
            if (mapped == MAP_FAILED) throw std::runtime_error("mmap");
        }
        Side(const Side&) = delete;
        Side& operator=(const Side&) = delete;
        ~Side() { munmap(mapped, bytes); }

        ssize_t write_page(std::uint64_t at, const std::string& content) {
            std::memset(memory.data(), 0, 4096);
            std::memcpy(memory.data(), content.data(), std::min<std::size_t>(content.size(), 4096));
            return pwrite(direct.fd(), memory.data(), 4096, static_cast<off_t>(at));
        }
        std::string read_page(std::uint64_t at) {
            const auto count = pread(direct.fd(), memory.data(), 4096, static_cast<off_t>(at));
            return {reinterpret_cast<const char*>(memory.data()), count < 0 ? 0 : static_cast<std::size_t>(count)};
        }

        OpenFile buffered;
        OpenFile direct;
        char* mapped;
        std::uint64_t bytes;
        PageMemory memory{4096};
    };

    template <class F>
    void both(F&& operation) {
        const auto ours = operation(files_[0]);
        const auto theirs = operation(files_[1]);
        ASSERT_TRUE(ours == theirs);
    }

    std::uint64_t size_;
    std::array<Side, 2> files_;
};

TEST_F(MountToolTest, DoesTheSameAsAnOrdinaryFile) {
    constexpr std::uint64_t size = 4 * MiB;
    must_tool({"create", "-q", "-o", "extended_l2=on", "disk.qcow2", "4M"});
    must_run({"truncate", "-s", "4M", "ordinary"}, directory_.path());
    mount();
    {
        SameOperations operations(directory_ / "mounted", directory_ / "ordinary", size);
        auto random = Random::named("mount operations");
        for (unsigned i = 0; i < 400 * effort() && !HasFailure(); ++i) operations.perform(random);
        operations.expect_holes_of_zeros();
    }
    EXPECT_EQ(end(SIGTERM).status, 0);
    EXPECT_EQ(qemu_img({"compare", "-f", "raw", "-F", "qcow2", "ordinary", "disk.qcow2"}, directory_.path()).status, 0);
    expect_clean();
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
