#include "storage/file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "base/bits.h"
#include "support/bytes.h"
#include "support/loop_device.h"
#include "support/random.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow {
namespace {

using namespace qcow::test;

class FileStorage : public testing::Test {
protected:
    /// The file "disk", made to hold `contents`.
    std::string file(std::string_view contents = "0123456789") {
        write_file(directory_ / "disk", contents);
        return directory_ / "disk";
    }
    std::shared_ptr<Storage> writable(std::string_view contents = "0123456789") {
        return must(open_file(file(contents), {.writable = true}));
    }

    TemporaryDirectory directory_;
};

TEST_F(FileStorage, ReadsWhatTheFileHas) {
    const auto storage = must(open_file(file()));
    EXPECT_EQ(must(storage->size()), 10U);
    Bytes read(4);
    EXPECT_EQ(must(storage->read({3}, read)), 4U);
    EXPECT_EQ(read, text_bytes("3456"));
}

TEST(BlockDevice, IsAFileThatDoesNotGrow) {
    const LoopDevice device(2 * MiB);
    if (!device.obstacle().empty()) GTEST_SKIP() << device.obstacle();
    const auto storage = must(open_file(device.path(), {.writable = true}));
    EXPECT_EQ(must(storage->size()), 2 * MiB);
    EXPECT_EQ(must(storage->allocated()), 2 * MiB);
    must(storage->write({MiB}, repeated(8192, 7)));
    must(storage->write_zeroes({MiB}, 4096));
    // Its space is there.
    must(storage->allocate({0}, 2 * MiB));
    EXPECT_TRUE(fails(storage->allocate({MiB}, 2 * MiB), Errc::no_space, {device.path()}));
    EXPECT_TRUE(fails(storage->resize(3 * MiB), Errc::no_space, {device.path()}));
    must(storage->flush());
    Bytes read(8192);
    EXPECT_EQ(must(storage->read({MiB}, read)), 8192U);
    EXPECT_EQ(read, joined({repeated(4096, 0), repeated(4096, 7)}));
}

TEST_F(FileStorage, ReadsZerosPastTheEndAndTellsHowMuchCameFromBefore) {
    const auto storage = must(open_file(file()));
    Bytes read = repeated(4, 0xee);
    EXPECT_EQ(must(storage->read({8}, read)), 2U);
    EXPECT_EQ(read, joined({text_bytes("89"), repeated(2, 0)}));
    read = repeated(4, 0xee);
    EXPECT_EQ(must(storage->read({10}, read)), 0U);
    EXPECT_EQ(read, repeated(4, 0));
}

TEST_F(FileStorage, ReadsZerosWhereNoFileReaches) {
    const auto storage = must(open_file(file()));
    Bytes read = repeated(4, 0xee);
    EXPECT_EQ(must(storage->read({std::uint64_t{1} << 62}, read)), 0U);
    EXPECT_EQ(read, repeated(4, 0));
    // What the system's signed offsets cannot express.
    read = repeated(4, 0xee);
    EXPECT_EQ(must(storage->read({std::uint64_t{1} << 63}, read)), 0U);
    EXPECT_EQ(read, repeated(4, 0));
    read = repeated(4, 0xee);
    EXPECT_EQ(must(storage->read({~std::uint64_t{0}}, read)), 0U);
    EXPECT_EQ(read, repeated(4, 0));
}

TEST_F(FileStorage, IsNamedByThePathThatItWasOpenedBy) {
    const auto path = file();
    EXPECT_EQ(must(open_file(path))->name(), path);
}

TEST_F(FileStorage, IdentityIsThatOfTheFileNotOfTheName) {
    const auto path = file();
    ASSERT_EQ(link(path.c_str(), (directory_ / "link").c_str()), 0);
    write_file(directory_ / "other", "0123456789");
    EXPECT_EQ(must(open_file(path))->identity(), must(open_file(directory_ / "link"))->identity());
    EXPECT_NE(must(open_file(path))->identity(), must(open_file(directory_ / "other"))->identity());
}

TEST_F(FileStorage, WritesInPlaceAndGrows) {
    const auto storage = writable();
    must(storage->write({8}, text_bytes("abcd")));
    EXPECT_EQ(must(storage->size()), 12U);
    must(storage->flush());
    EXPECT_EQ(read_file(directory_ / "disk"), "01234567abcd");
}

TEST_F(FileStorage, OpenedForReadingIsNotWritten) {
    const auto path = file();
    const auto storage = must(open_file(path));
    EXPECT_TRUE(fails(storage->write({0}, text_bytes("x")), Errc::read_only, {path, "for reading only"}));
    EXPECT_TRUE(fails(storage->write_zeroes({0}, 1), Errc::read_only, {path}));
    EXPECT_TRUE(fails(storage->resize(1), Errc::read_only, {path}));
    EXPECT_TRUE(storage->flush());
    EXPECT_EQ(read_file(path), "0123456789");
}

TEST_F(FileStorage, ZeroesWithoutGrowing) {
    const auto storage = writable();
    must(storage->write_zeroes({2}, 3));
    must(storage->write_zeroes({8}, 100));
    must(storage->write_zeroes({50}, 100));
    must(storage->write_zeroes({9}, ~std::uint64_t{0}));
    EXPECT_EQ(must(storage->size()), 10U);
    EXPECT_EQ(read_file(directory_ / "disk"), std::string("01\0\0\0"
                                                          "567\0\0",
                                                          10));
}

TEST_F(FileStorage, ResizesWithZeros) {
    const auto storage = writable();
    must(storage->resize(2));
    must(storage->resize(4));
    EXPECT_EQ(read_file(directory_ / "disk"), std::string("01\0\0", 4));
}

TEST_F(FileStorage, RefusesASizeThatFilesCannotHave) {
    const auto storage = writable();
    EXPECT_FALSE(storage->resize(~std::uint64_t{0}));
    EXPECT_FALSE(storage->write({~std::uint64_t{0}}, text_bytes("x")));
    EXPECT_EQ(must(storage->size()), 10U);
}

// ---- Holes ----

class Holes : public FileStorage {
protected:
    /// A hole of 1 MiB, 1 MiB of data, a hole of 1 MiB.
    std::shared_ptr<Storage> sparse() {
        auto storage = writable("");
        must(storage->resize(3 * MiB));
        must(storage->write({MiB}, repeated(MiB, 0x55)));
        return has_holes() ? storage : nullptr;
    }

private:
    /// Whether the file system itself tells the first hole of sparse() from data.
    [[nodiscard]] bool has_holes() const {
        const FileDescriptor fd(open((directory_ / "disk").c_str(), O_RDONLY | O_CLOEXEC));
        return lseek(fd.get(), 0, SEEK_DATA) == static_cast<off_t>(MiB);
    }
};

TEST_F(Holes, AreToldFromData) {
    const auto storage = sparse();
    if (!storage) GTEST_SKIP() << "no holes on this file system";
    const auto hole = must(storage->run({0}, 10 * MiB));
    EXPECT_FALSE(hole.data);
    EXPECT_EQ(hole.length, MiB);
    const auto data = must(storage->run({MiB}, 10 * MiB));
    EXPECT_TRUE(data.data);
    EXPECT_EQ(data.length, MiB);
    const auto last = must(storage->run({2 * MiB}, 10 * MiB));
    EXPECT_FALSE(last.data);
    EXPECT_EQ(last.length, MiB);
}

TEST_F(Holes, AreToldInAnyOrder) {
    if (!sparse()) GTEST_SKIP() << "no holes on this file system";
    // Data in every third MiB. What was asked for before must not change an answer.
    auto storage = writable("");
    must(storage->resize(60 * MiB));
    for (std::uint64_t at = 0; at < 60 * MiB; at += 3 * MiB) must(storage->write({at}, repeated(MiB, 0x55)));
    storage.reset();
    storage = must(open_file(directory_ / "disk"));
    auto random = Random::named("holes");
    for (unsigned i = 0; i < 500; ++i) {
        const auto at = random.below(60 * MiB);
        const auto place = at % (3 * MiB);
        const auto run = must(storage->run({at}, 10 * MiB));
        EXPECT_EQ(run.data, place < MiB) << at;
        EXPECT_EQ(run.length, (place < MiB ? MiB : 3 * MiB) - place) << at;
    }
}

TEST_F(Holes, RunsBeginAndEndInTheMiddle) {
    const auto storage = sparse();
    if (!storage) GTEST_SKIP() << "no holes on this file system";
    EXPECT_EQ(must(storage->run({MiB - 100}, MiB)).length, 100U);
    EXPECT_EQ(must(storage->run({100}, 1000)).length, 1000U);
    const auto data = must(storage->run({2 * MiB - 100}, MiB));
    EXPECT_TRUE(data.data);
    EXPECT_EQ(data.length, 100U);
}

TEST_F(Holes, AreWhatZeroedClustersBecome) {
    const auto storage = sparse();
    if (!storage) GTEST_SKIP() << "no holes on this file system";
    const auto before = must(storage->allocated());
    EXPECT_GE(before, MiB);
    EXPECT_LT(before, 2 * MiB);
    must(storage->write_zeroes({MiB}, MiB / 2));
    EXPECT_EQ(must(storage->run({0}, 10 * MiB)).length, MiB + MiB / 2);
    EXPECT_LT(must(storage->allocated()), before);
}

TEST_F(Holes, ThereIsNothingElsePastTheEnd) {
    const auto storage = writable();
    for (const auto at : {std::uint64_t{10}, std::uint64_t{1} << 62, ~std::uint64_t{0}}) {
        const auto past = must(storage->run({at}, 100));
        EXPECT_FALSE(past.data);
        EXPECT_EQ(past.length, 100U);
    }
    const auto to_the_end = must(storage->run({4}, 100));
    EXPECT_EQ(to_the_end.length, 6U);
}

// ---- Copies made by the kernel ----

TEST_F(FileStorage, CopiesAsMuchAsTheKernelDoes) {
    const auto storage = writable();
    write_file(directory_ / "source", std::string(65536, 's'));
    const auto source = must(open_file(directory_ / "source"));
    must(storage->resize(65536));
    const auto done = must(storage->copy_from(*source, {0}, {0}, 65536));
    ASSERT_LE(done, 65536U);
    EXPECT_EQ(read_file(directory_ / "disk").substr(0, done), std::string(done, 's'));
}

TEST_F(FileStorage, CopiesNothingFromMemory) {
    EXPECT_EQ(must(writable()->copy_from(*memory_storage(repeated(10, 1)), {0}, {0}, 10)), 0U);
}

// ---- What cannot be opened ----

TEST_F(FileStorage, AFileThatIsNotThere) {
    const auto path = directory_ / "absent";
    EXPECT_TRUE(fails(open_file(path), Errc::not_found, {path, "cannot open", "No such file"}));
    EXPECT_TRUE(fails(open_file(path, {.writable = true}), Errc::not_found));
    EXPECT_TRUE(fails(open_file(file() + "/below-a-file"), Errc::not_found));
    EXPECT_TRUE(directory_.names() == std::set<std::string>{"disk"}) << "opening does not create";
}

TEST_F(FileStorage, ADirectory) {
    EXPECT_TRUE(fails(open_file(directory_ / ""), Errc::invalid_argument, {"is a directory"}));
}

TEST_F(FileStorage, AFifoIsRefusedNotWaitedFor) {
    ASSERT_EQ(mkfifo((directory_ / "fifo").c_str(), 0600), 0);
    EXPECT_TRUE(fails(open_file(directory_ / "fifo"), Errc::invalid_argument, {"is a pipe"}));
}

TEST_F(FileStorage, ACharacterDevice) {
    EXPECT_TRUE(fails(open_file("/dev/null"), Errc::invalid_argument, {"/dev/null: is neither a regular file"}));
}

TEST_F(FileStorage, AFileThatMayNotBeRead) {
    const auto path = file();
    ASSERT_EQ(chmod(path.c_str(), 0), 0);
    // Root may read everything: step down for a moment.
    constexpr uid_t nobody = 65534;
    const uid_t user = geteuid();
    if (user == 0) {
        ASSERT_EQ(seteuid(nobody), 0);
    }
    const auto opened = open_file(path);
    ASSERT_EQ(seteuid(user), 0);
    EXPECT_TRUE(fails(opened, Errc::access_denied, {path}));
}

// ---- The system's errors ----

TEST(SystemError, KeepsApartWhatCallersTellApart) {
    const auto code = [](int error) { return system_error("cannot open", "disk", error).error().code; };
    EXPECT_EQ(code(ENOENT), Errc::not_found);
    EXPECT_EQ(code(ENOTDIR), Errc::not_found);
    EXPECT_EQ(code(EACCES), Errc::access_denied);
    EXPECT_EQ(code(EPERM), Errc::access_denied);
    EXPECT_EQ(code(EROFS), Errc::access_denied);
    EXPECT_EQ(code(ENOSPC), Errc::no_space);
    EXPECT_EQ(code(EDQUOT), Errc::no_space);
    EXPECT_EQ(code(EFBIG), Errc::no_space);
    EXPECT_EQ(code(EIO), Errc::io);
}

TEST(SystemError, SaysWhatWasTriedAndWhatTheSystemSays) {
    EXPECT_EQ(system_error("cannot read 512 bytes at 0x200", "disk", EIO).error().message(),
              "disk: cannot read 512 bytes at 0x200: Input/output error");
}

TEST(FileDescriptors, AreClosedByTheirOwner) {
    const auto is_open = [](int fd) { return fcntl(fd, F_GETFD) >= 0; };
    const int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    {
        FileDescriptor first(fd);
        const FileDescriptor second(std::move(first));
        EXPECT_EQ(second.get(), fd);
        EXPECT_TRUE(is_open(fd));
    }
    EXPECT_FALSE(is_open(fd));
}

TEST(File, ReadsZerosWhereOffsetsEnd) {
    const TemporaryDirectory directory;
    write_file(directory / "a", "x");
    Bytes bytes(512);
    EXPECT_EQ(must(must(open_file(directory / "a"))->read({0x7fff'ffff'ffff'ffff - 10}, bytes)), 0U);
}

}  // namespace
}  // namespace qcow
