// Locks: we and QEMU's tools keep out of each other's way.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "qcow/files_in_use.h"
#include "support/disks.h"
#include "support/qemu.h"
#include "support/temporary_directory.h"

namespace qcow::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;

/// qemu-io with an image open, until it goes.
class Holder {
public:
    Holder(const std::string& image, const std::filesystem::path& directory, Arguments options = {})
        : process_(arguments(image, std::move(options)), directory) {
        // It answers only once the image is open.
        process_.write("length\n");
        process_.wait_for(" MiB");
    }

    void write(const std::string& command) {
        process_.write(command + "\n");
        process_.wait_for("wrote ");
    }

    void stop() {
        const auto finished = process_.finish();
        if (finished.status != 0) throw std::runtime_error(finished.text());
    }

private:
    static Arguments arguments(const std::string& image, Arguments options) {
        options.insert(options.begin(), "qemu-io");
        options.push_back(image);
        return options;
    }

    Subprocess process_;
};

class LockTest : public testing::Test {
protected:
    void SetUp() override {
        must_qemu_img({"create", "-q", "-f", "qcow2", "disk.qcow2", "4M"}, directory_.path());
        must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 17 1M 64k"}, directory_.path());
        must_qemu_img({"create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "overlay.qcow2"},
                      directory_.path());
    }

    [[nodiscard]] std::string disk() const { return directory_.file("disk.qcow2"); }
    [[nodiscard]] std::string overlay() const { return directory_.file("overlay.qcow2"); }

    static Result<std::shared_ptr<Image>> open_forced(const std::string& path) {
        auto storage = open_file(path, {.writable = false, .force_share = true});
        if (!storage) return std::unexpected(storage.error());
        OpenOptions options;
        options.gate = local_files(true);
        return open_image(*storage, options);
    }

    static void expect_contents(Disk& disk) {
        std::vector<std::byte> bytes(4096);
        value_of(disk.read({1 << 20}, bytes));
        EXPECT_THAT(bytes, testing::Each(std::byte{17}));
    }

    static void expect_locked(const Result<std::shared_ptr<Image>>& opened, const std::string& path) {
        ASSERT_FALSE(opened) << "it was opened although it is locked";
        EXPECT_EQ(opened.error().code, Errc::locked);
        EXPECT_THAT(opened.error().message(), AllOf(HasSubstr(path), HasSubstr("-U")));
    }

    TemporaryDirectory directory_;
};

TEST_F(LockTest, WriterExcludesOurReader) {
    Holder writer("disk.qcow2", directory_.path());
    expect_locked(try_open(disk()), disk());
    expect_contents(*value_of(open_forced(disk())));
    writer.stop();
    expect_contents(*must_open(disk()));
}

TEST_F(LockTest, WriterExcludesOurWriterAlsoIfForced) {
    Holder writer("disk.qcow2", directory_.path());
    const auto opened = open_file(disk(), {.writable = true});
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code, Errc::locked);
    EXPECT_THAT(opened.error().message(), HasSubstr(disk()));
}

TEST_F(LockTest, WriterOfTheBackingFileExcludesReadersOfTheOverlay) {
    Holder writer("disk.qcow2", directory_.path());
    expect_locked(try_open(overlay()), disk());
    expect_contents(*value_of(open_forced(overlay())));
}

TEST_F(LockTest, WriterOfAnOverlaySharesTheBackingFile) {
    Holder writer("overlay.qcow2", directory_.path());
    writer.write("write -P 3 0 64k");
    expect_contents(*must_open(disk()));
    expect_locked(try_open(overlay()), overlay());
}

TEST_F(LockTest, WriterOfADataFileExcludesReaders) {
    must_qemu_img({"create", "-q", "-f", "qcow2", "-o", "data_file=disk.data", "split.qcow2", "4M"}, directory_.path());
    Holder writer("split.qcow2", directory_.path());
    expect_locked(try_open(directory_.file("split.qcow2")), directory_.file("split.qcow2"));
    expect_locked(try_open(directory_.file("disk.data"), Format::raw), directory_.file("disk.data"));
}

TEST_F(LockTest, ReadersCoexist) {
    Holder reader("disk.qcow2", directory_.path(), {"-r"});
    const auto first = must_open(disk());
    const auto second = must_open(disk());
    expect_contents(*first);
    expect_contents(*second);
    EXPECT_EQ(qemu_img({"info", disk()}).status, 0);
}

TEST_F(LockTest, ReaderOfTheirsExcludesOurWriter) {
    Holder reader("disk.qcow2", directory_.path(), {"-r"});
    const auto opened = open_file(disk(), {.writable = true});
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code, Errc::locked);
}

TEST_F(LockTest, OurReaderExcludesTheirWriter) {
    auto image = must_open(disk());
    const auto refused = run({"qemu-io", "-c", "write 0 64k", disk()});
    EXPECT_NE(refused.status, 0);
    EXPECT_THAT(refused.err, AllOf(HasSubstr("Failed to get"), HasSubstr("lock")));
    image.reset();
    EXPECT_EQ(run({"qemu-io", "-c", "write 0 64k", disk()}).status, 0);
}

TEST_F(LockTest, OurReaderOfAnOverlayExcludesTheirWriterOfTheBackingFile) {
    const auto image = must_open(overlay());
    const auto refused = run({"qemu-io", "-c", "write 0 64k", disk()});
    EXPECT_NE(refused.status, 0);
    EXPECT_THAT(refused.err, HasSubstr("Failed to get"));
}

TEST_F(LockTest, OurForcedReaderExcludesNobody) {
    const auto image = value_of(open_forced(disk()));
    EXPECT_EQ(run({"qemu-io", "-c", "write 0 64k", disk()}).status, 0);
}

TEST_F(LockTest, OurWriterExcludesTheirReaders) {
    auto storage = value_of(open_file(disk(), {.writable = true}));
    const auto refused = qemu_img({"info", disk()});
    EXPECT_NE(refused.status, 0);
    EXPECT_THAT(refused.err, AllOf(HasSubstr("Failed to get"), HasSubstr("lock")));
    EXPECT_EQ(qemu_img({"info", "-U", disk()}).status, 0);
    storage.reset();
    EXPECT_EQ(qemu_img({"info", disk()}).status, 0);
}

TEST_F(LockTest, OurWriterExcludesOurs) {
    const auto storage = value_of(open_file(disk(), {.writable = true}));
    expect_locked(try_open(disk()), disk());
    EXPECT_FALSE(open_file(disk(), {.writable = true}));
    expect_contents(*value_of(open_forced(disk())));
}

TEST_F(LockTest, ARefusedOpenLeavesNoLocksBehind) {
    {
        Holder writer("disk.qcow2", directory_.path());
        EXPECT_FALSE(try_open(disk()));
        EXPECT_FALSE(open_file(disk(), {.writable = true}));
    }
    Holder writer("disk.qcow2", directory_.path());
    writer.write("write -P 3 0 64k");
    writer.stop();
}

TEST_F(LockTest, ATargetThatIsInUseIsNotReplaced) {
    Holder reader("disk.qcow2", directory_.path(), {"-r"});
    FilesInUse in_use;
    const auto target = NewFile::begin(disk(), in_use, "the target");
    ASSERT_FALSE(target);
    EXPECT_EQ(target.error().code, Errc::locked);
}

TEST_F(LockTest, ToolSaysWhatToDo) {
    Holder writer("disk.qcow2", directory_.path());
    for (const std::string command : {"info", "map", "check"}) {
        const auto refused = run({QCOW_TOOL, command, disk()});
        EXPECT_EQ(refused.status, 1) << refused.text();
        EXPECT_EQ(refused.out, "") << refused.text();
        EXPECT_THAT(refused.err, AllOf(HasSubstr(disk()), HasSubstr("-U"))) << refused.text();
        EXPECT_EQ(run({QCOW_TOOL, command, "-U", disk()}).status, 0);
    }
}

}  // namespace
}  // namespace qcow::test
