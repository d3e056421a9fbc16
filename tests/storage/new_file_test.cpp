#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>

#include "qcow/storage.h"
#include "support/bytes.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow {
namespace {

using namespace qcow::test;
using testing::ElementsAre;
using testing::IsEmpty;

class NewFiles : public testing::Test {
protected:
    /// Begins `path` and gives it contents, but not yet its name.
    static NewFile written(const std::string& path, std::string_view contents = "new contents") {
        auto file = must(NewFile::begin(path));
        must(file.storage()->write({0}, text_bytes(contents)));
        return file;
    }

    TemporaryDirectory directory_;
    std::string path_ = directory_ / "disk";
};

TEST_F(NewFiles, AreNotThereBeforeTheyArePublished) {
    const auto file = written(path_);
    EXPECT_THAT(directory_.names(), IsEmpty());
}

TEST_F(NewFiles, AppearWithTheirContents) {
    auto file = written(path_);
    must(file.publish());
    EXPECT_THAT(directory_.names(), ElementsAre("disk"));
    EXPECT_EQ(read_file(path_), "new contents");
}

TEST_F(NewFiles, AreGoneWhenDropped) {
    {
        const auto file = written(path_);
    }
    EXPECT_THAT(directory_.names(), IsEmpty());
}

TEST_F(NewFiles, AreGoneWhenMovedAndDropped) {
    {
        auto file = written(path_);
        const auto moved = std::move(file);
        EXPECT_EQ(must(moved.storage()->size()), 12U);
    }
    EXPECT_THAT(directory_.names(), IsEmpty());
}

TEST_F(NewFiles, StayWhenTheirMakerIsGone) {
    {
        auto file = written(path_);
        must(file.publish());
    }
    EXPECT_THAT(directory_.names(), ElementsAre("disk"));
    EXPECT_EQ(read_file(path_), "new contents");
}

TEST_F(NewFiles, CanBeWrittenOnAfterTheyArePublished) {
    auto file = written(path_);
    must(file.publish());
    must(file.storage()->write({0}, text_bytes("NEW")));
    EXPECT_EQ(read_file(path_), "NEW contents");
}

TEST_F(NewFiles, StartAsZeros) {
    const auto file = must(NewFile::begin(path_));
    EXPECT_TRUE(file.starts_as_zeros());
    EXPECT_EQ(must(file.storage()->size()), 0U);
}

TEST_F(NewFiles, AreNamedAsTheyWillBe) {
    const auto file = must(NewFile::begin(path_));
    EXPECT_EQ(file.storage()->name(), path_);
}

TEST_F(NewFiles, AreLockedUntilTheirMakerIsDone) {
    {
        auto file = written(path_);
        must(file.publish());
        EXPECT_TRUE(fails(open_file(path_), Errc::locked));
    }
    EXPECT_TRUE(open_file(path_));
}

// ---- In place of a file that there is ----

TEST_F(NewFiles, LeaveTheOldContentsUntilTheyArePublished) {
    write_file(path_, "old");
    auto file = written(path_);
    EXPECT_EQ(read_file(path_), "old");
    must(file.publish());
    EXPECT_EQ(read_file(path_), "new contents");
    EXPECT_THAT(directory_.names(), ElementsAre("disk"));
}

TEST_F(NewFiles, LeaveTheOldFileWhenDropped) {
    write_file(path_, "old");
    {
        const auto file = written(path_);
    }
    EXPECT_EQ(read_file(path_), "old");
    EXPECT_THAT(directory_.names(), ElementsAre("disk"));
    EXPECT_TRUE(open_file(path_, {.writable = true}));
}

TEST_F(NewFiles, TakeTheNameNotTheFile) {
    // Who has the old file open goes on seeing the old contents.
    write_file(path_, "old");
    const auto old = must(open_file(path_, {.force_share = true}));
    auto file = written(path_);
    must(file.publish());
    Bytes read(3);
    must(old->read({0}, read));
    EXPECT_EQ(read, text_bytes("old"));
}

TEST_F(NewFiles, KeepThePermissionsOfTheOldFile) {
    write_file(path_, "old");
    ASSERT_EQ(chmod(path_.c_str(), 0640), 0);
    auto file = written(path_);
    must(file.publish());
    struct stat status = {};
    ASSERT_EQ(stat(path_.c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 07777, 0640U);
}

TEST_F(NewFiles, AreRefusedWhereTheOldFileIsInUse) {
    write_file(path_, "old");
    {
        const auto reader = must(open_file(path_));
        EXPECT_TRUE(fails(NewFile::begin(path_), Errc::locked, {path_, "another process is using it"}));
    }
    EXPECT_TRUE(NewFile::begin(path_));
    EXPECT_EQ(read_file(path_), "old");
}

TEST_F(NewFiles, HoldTheOldFileSoThatNobodyBeginsToUseIt) {
    write_file(path_, "old");
    const auto file = must(NewFile::begin(path_));
    EXPECT_TRUE(fails(open_file(path_), Errc::locked));
    EXPECT_TRUE(fails(NewFile::begin(path_), Errc::locked));
}

// ---- Symbolic links ----

TEST_F(NewFiles, KeepASymbolicLinkAndReplaceItsTarget) {
    std::filesystem::create_directory(directory_ / "images");
    write_file(directory_ / "images/disk-1", "old");
    std::filesystem::create_symlink("images/disk-1", path_);
    auto file = written(path_);
    EXPECT_EQ(read_file(path_), "old");
    must(file.publish());
    EXPECT_TRUE(std::filesystem::is_symlink(path_));
    EXPECT_EQ(read_file(directory_ / "images/disk-1"), "new contents");
    EXPECT_THAT(directory_.names(), ElementsAre("disk", "images"));
}

TEST_F(NewFiles, FollowALinkToADirectory) {
    std::filesystem::create_directory(directory_ / "images");
    std::filesystem::create_directory_symlink("images", directory_ / "link");
    auto file = written(directory_ / "link/disk");
    must(file.publish());
    EXPECT_EQ(read_file(directory_ / "images/disk"), "new contents");
}

// ---- What cannot be ----

TEST_F(NewFiles, NeedTheirDirectory) {
    const auto path = directory_ / "absent/disk";
    EXPECT_TRUE(fails(NewFile::begin(path), Errc::not_found, {path, "cannot create"}));
}

TEST_F(NewFiles, DoNotReplaceADirectory) {
    const auto file = NewFile::begin(directory_ / ".");
    ASSERT_FALSE(file);
    EXPECT_THAT(file.error().message(), testing::HasSubstr("s a directory"));
    EXPECT_TRUE(std::filesystem::is_directory(directory_ / "."));
}

TEST_F(NewFiles, CanHaveARelativeName) {
    const auto before = std::filesystem::current_path();
    std::filesystem::current_path(directory_ / ".");
    {
        auto file = written("disk");
        must(file.publish());
    }
    std::filesystem::current_path(before);
    EXPECT_EQ(read_file(path_), "new contents");
}

TEST(NewFile, MakesWhatADanglingLinkNames) {
    const TemporaryDirectory directory;
    std::filesystem::create_symlink("target", directory / "link");
    auto file = must(NewFile::begin(directory / "link"));
    must(file.publish());
    EXPECT_TRUE(std::filesystem::is_symlink(directory / "link"));
    EXPECT_TRUE(std::filesystem::exists(directory / "target"));
}

TEST(NewFile, PublishingTwiceIsPublishing) {
    const TemporaryDirectory directory;
    auto file = must(NewFile::begin(directory / "a"));
    must(file.publish());
    must(file.publish());
    EXPECT_EQ(directory.names(), std::set<std::string>{"a"});
}

TEST(NewFile, DoesNotReplaceOneThatWasMadeAndIsInUseMeanwhile) {
    const TemporaryDirectory directory;
    auto first = must(NewFile::begin(directory / "a"));
    auto second = must(NewFile::begin(directory / "a"));
    must(first.publish());
    EXPECT_TRUE(fails(second.publish(), Errc::locked));
}

TEST(NewFile, MayHaveTheLongestName) {
    const TemporaryDirectory directory;
    auto file = must(NewFile::begin(directory / std::string(255, 'n')));
    must(file.publish());
}

TEST(NewFile, NeedsAName) { EXPECT_TRUE(fails(NewFile::begin(""), Errc::invalid_argument)); }

}  // namespace
}  // namespace qcow
