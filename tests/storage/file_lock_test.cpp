#include "storage/file_lock.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include "qcow/storage.h"
#include "storage/file.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow {
namespace {

using namespace qcow::test;

constexpr FileOptions reading = {};
constexpr FileOptions writing = {.writable = true};
constexpr FileOptions forced_reading = {.force_share = true};

// Locks belong to the open file, not to the process: two opens in one process conflict as those of two do.
class FileLock : public testing::Test {
protected:
    FileLock() { write_file(path_, "disk"); }

    Result<std::shared_ptr<Storage>> open(const FileOptions& options) { return open_file(path_, options); }

    struct flock byte_lock(off_t byte, short type) {
        struct flock lock = {};
        lock.l_type = type;
        lock.l_whence = SEEK_SET;
        lock.l_start = byte;
        lock.l_len = 1;
        return lock;
    }
    /// Whether anybody has a lock on the byte.
    bool is_locked(off_t byte) {
        const FileDescriptor fd(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
        auto lock = byte_lock(byte, F_WRLCK);
        EXPECT_EQ(fcntl(fd.get(), F_OFD_GETLK, &lock), 0);
        return lock.l_type != F_UNLCK;
    }
    /// A shared lock on one byte, as another program would take it.
    FileDescriptor foreign_lock(off_t byte) {
        FileDescriptor fd(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
        auto lock = byte_lock(byte, F_RDLCK);
        EXPECT_EQ(fcntl(fd.get(), F_OFD_SETLK, &lock), 0);
        return fd;
    }

    TemporaryDirectory directory_;
    std::string path_ = directory_ / "disk";
};

// ---- Among ourselves ----

TEST_F(FileLock, ReadersShare) {
    const auto first = must(open(reading));
    EXPECT_TRUE(open(reading));
}

TEST_F(FileLock, AReaderExcludesWriters) {
    const auto reader = must(open(reading));
    EXPECT_TRUE(fails(open(writing), Errc::locked, {path_, "another process is using it", "stop that process first"}));
}

TEST_F(FileLock, AWriterExcludesReadersAndNamesTheRemedy) {
    const auto writer = must(open(writing));
    EXPECT_TRUE(fails(open(reading), Errc::locked, {path_, "another process is using it", "--force-share"}));
}

TEST_F(FileLock, AWriterExcludesWriters) {
    const auto writer = must(open(writing));
    const auto second = open(writing);
    EXPECT_TRUE(fails(second, Errc::locked, {path_}));
    // Sharing by force is no remedy for a writer.
    EXPECT_EQ(second.error().message().find("--force-share"), std::string::npos);
}

TEST_F(FileLock, AForcedReaderMindsNobodyAndHindersNobody) {
    const auto writer = must(open(writing));
    const auto forced = must(open(forced_reading));
    EXPECT_FALSE(open(reading));
    EXPECT_FALSE(open(writing));
}

TEST_F(FileLock, AForcedReaderDoesNotExcludeWriters) {
    const auto forced = must(open(forced_reading));
    EXPECT_TRUE(open(writing));
}

TEST_F(FileLock, EndsWithTheStorage) {
    {
        const auto writer = must(open(writing));
    }
    {
        const auto reader = must(open(reading));
    }
    EXPECT_TRUE(open(writing));
}

TEST_F(FileLock, WhoIsRefusedLeavesNoLock) {
    {
        const auto reader = must(open(reading));
        ASSERT_FALSE(open(writing));
        EXPECT_TRUE(open(reading));
    }
    EXPECT_TRUE(open(writing));
}

TEST_F(FileLock, IsThatOfTheFileNotOfTheName) {
    std::filesystem::create_hard_link(path_, directory_ / "link");
    const auto writer = must(open(writing));
    EXPECT_TRUE(fails(open_file(directory_ / "link"), Errc::locked));
}

// ---- Together with QEMU: byte 100 + p is held by who uses permission p, byte 200 + p by who lets nobody else ----
// ---- p: 0 consistent reads, 1 writes, 2 writes that change nothing, 3 resizes                                ----

TEST_F(FileLock, AReaderReadsAndLetsNobodyWriteOrResize) {
    const auto reader = must(open(reading));
    EXPECT_TRUE(is_locked(100));
    EXPECT_FALSE(is_locked(101));
    EXPECT_FALSE(is_locked(103));
    EXPECT_FALSE(is_locked(200));
    EXPECT_TRUE(is_locked(201));
    EXPECT_TRUE(is_locked(203));
}

TEST_F(FileLock, AWriterAlsoWritesAndResizes) {
    const auto writer = must(open(writing));
    EXPECT_TRUE(is_locked(100));
    EXPECT_TRUE(is_locked(101));
    EXPECT_TRUE(is_locked(103));
    EXPECT_FALSE(is_locked(200));
    EXPECT_TRUE(is_locked(201));
    EXPECT_TRUE(is_locked(203));
}

TEST_F(FileLock, NobodyWritesWithoutLocks) {
    EXPECT_TRUE(fails(open({.writable = true, .force_share = true}), Errc::invalid_argument, {path_, "for reading"}));
}

TEST_F(FileLock, AForcedReaderTakesNone) {
    const auto forced = must(open(forced_reading));
    EXPECT_FALSE(is_locked(100));
    EXPECT_FALSE(is_locked(201));
}

TEST_F(FileLock, AForeignReaderIsLetAlone) {
    const auto held = foreign_lock(100);
    EXPECT_TRUE(open(reading));
    EXPECT_TRUE(open(writing));
}

TEST_F(FileLock, AForeignWriterExcludesReaders) {
    const auto held = foreign_lock(101);
    EXPECT_TRUE(fails(open(reading), Errc::locked, {"no \"write\" lock"}));
    EXPECT_TRUE(open(forced_reading));
}

TEST_F(FileLock, AForeignResizerExcludesReaders) {
    const auto held = foreign_lock(103);
    EXPECT_TRUE(fails(open(reading), Errc::locked, {"no \"resize\" lock"}));
}

TEST_F(FileLock, WhoLetsNobodyReadExcludesReaders) {
    const auto held = foreign_lock(200);
    EXPECT_TRUE(fails(open(reading), Errc::locked, {"no \"read\" lock"}));
}

TEST_F(FileLock, WhoLetsNobodyWriteExcludesWritersOnly) {
    const auto held = foreign_lock(201);
    EXPECT_TRUE(open(reading));
    EXPECT_TRUE(fails(open(writing), Errc::locked, {"no \"write\" lock"}));
}

TEST_F(FileLock, WritesThatChangeNothingAreLetAlone) {
    const auto held = foreign_lock(102);
    EXPECT_TRUE(open(reading));
    EXPECT_TRUE(open(writing));
}

}  // namespace
}  // namespace qcow
