#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <array>
#include <filesystem>
#include <optional>
#include <tuple>
#include <vector>

#include "qcow/files_in_use.h"
#include "qcow/storage.h"
#include "storage/system_calls.h"
#include "support/bytes.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow {
namespace {

using namespace qcow::test;
using testing::ElementsAre;
using testing::IsEmpty;

Result<NewFile> new_file(const std::string& path, NewFile::Existing existing = NewFile::Existing::replaced) {
    FilesInUse in_use;
    return NewFile::begin(path, in_use, "the target", existing);
}

std::string* told_incomplete = nullptr;

class NewFiles : public testing::Test {
protected:
    /// Begins `path` and gives it contents, but not yet its name.
    static NewFile written(const std::string& path, std::string_view contents = "new contents") {
        auto file = must(new_file(path));
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
    const auto file = must(new_file(path_));
    EXPECT_TRUE(file.starts_as_zeros());
    EXPECT_EQ(must(file.storage()->size()), 0U);
}

TEST_F(NewFiles, AreNamedAsTheyWillBe) {
    const auto file = must(new_file(path_));
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
        EXPECT_TRUE(fails(new_file(path_), Errc::locked, {path_, "another process is using it"}));
    }
    EXPECT_TRUE(new_file(path_));
    EXPECT_EQ(read_file(path_), "old");
}

TEST_F(NewFiles, HoldTheOldFileSoThatNobodyBeginsToUseIt) {
    write_file(path_, "old");
    const auto file = must(new_file(path_));
    EXPECT_TRUE(fails(open_file(path_), Errc::locked));
    EXPECT_TRUE(fails(new_file(path_), Errc::locked));
}

TEST_F(NewFiles, KeepExtendedAttributesAndTheAcl) {
    write_file(path_, "old");
    // Version 2; the owner rw, user 12345 r, the group none, the mask r, others none.
    const auto acl = joined({bytes({2, 0, 0, 0}), bytes({1, 0, 6, 0, 255, 255, 255, 255}),
                             bytes({2, 0, 4, 0, 0x39, 0x30, 0, 0}), bytes({4, 0, 0, 0, 255, 255, 255, 255}),
                             bytes({16, 0, 4, 0, 255, 255, 255, 255}), bytes({32, 0, 0, 0, 255, 255, 255, 255})});
    if (setxattr(path_.c_str(), "system.posix_acl_access", acl.data(), acl.size(), 0) != 0)
        GTEST_SKIP() << "no ACLs here";
    const bool has_user_attributes = setxattr(path_.c_str(), "user.note", "text", 4, 0) == 0;
    auto file = written(path_);
    must(file.publish());
    EXPECT_EQ(read_file(path_), "new contents");
    Bytes found(100);
    found.resize(static_cast<std::size_t>(
        std::max<ssize_t>(0, getxattr(path_.c_str(), "system.posix_acl_access", found.data(), found.size()))));
    EXPECT_EQ(found, acl);
    if (has_user_attributes) {
        std::array<char, 10> note = {};
        EXPECT_EQ(getxattr(path_.c_str(), "user.note", note.data(), note.size()), 4);
        EXPECT_EQ(std::string_view(note.data()), "text");
    }
}

TEST_F(NewFiles, KeepOwnerAndGroup) {
    if (geteuid() != 0) GTEST_SKIP() << "only root gives files away";
    write_file(path_, "old");
    ASSERT_EQ(chmod(path_.c_str(), 0640), 0);
    ASSERT_EQ(chown(path_.c_str(), 12345, 12346), 0);
    auto file = written(path_);
    must(file.publish());
    struct stat status = {};
    ASSERT_EQ(stat(path_.c_str(), &status), 0);
    EXPECT_EQ(status.st_uid, 12345U);
    EXPECT_EQ(status.st_gid, 12346U);
    EXPECT_EQ(status.st_mode & 07777, 0640U);
}

TEST_F(NewFiles, DoNotReplaceOneThatHoldsSomethingIfTheyMayNot) {
    using enum NewFile::Existing;
    EXPECT_TRUE(new_file(path_, only_if_empty));
    write_file(path_, "");
    EXPECT_TRUE(new_file(path_, only_if_empty));
    write_file(path_, "x");
    EXPECT_TRUE(fails(new_file(path_, only_if_empty), Errc::invalid_argument, {path_, "not empty"}));
    std::filesystem::remove(path_);
    auto file = must(new_file(path_, only_if_empty));
    write_file(path_, "made meanwhile");
    EXPECT_TRUE(fails(file.publish(), Errc::invalid_argument, {"not empty"}));
    EXPECT_EQ(read_file(path_), "made meanwhile");
}

TEST_F(NewFiles, DoNotReplaceAFileThatTheJobUses) {
    write_file(path_, "old");
    std::filesystem::create_hard_link(path_, directory_ / "link");
    FilesInUse in_use;
    must(in_use.add(FilesInUse::Use::read, path_, "the source"));
    EXPECT_TRUE(fails(NewFile::begin(directory_ / "link", in_use, "the target"), Errc::invalid_argument,
                      {"link", "the target would overwrite the source"}));
}

// ---- In place ----

/// A file that cannot be replaced, but written: for root a mount point, for others one in a directory that they may not
/// change.
class Irreplaceable {
public:
    explicit Irreplaceable(const TemporaryDirectory& directory) : directory_(directory), path_(directory / "disk") {
        write_file(path_, "old contents, which are long");
        if (geteuid() != 0) {
            chmod(directory.path().c_str(), 0555);
        } else if (mount(path_.c_str(), path_.c_str(), nullptr, MS_BIND, nullptr) != 0) {
            obstacle_ = "no mounts here";
        } else {
            mounted_ = true;
        }
    }
    Irreplaceable(const Irreplaceable&) = delete;
    Irreplaceable& operator=(const Irreplaceable&) = delete;
    ~Irreplaceable() {
        chmod(directory_.path().c_str(), 0755);
        if (mounted_) umount(path_.c_str());
    }
    [[nodiscard]] const std::string& obstacle() const { return obstacle_; }
    [[nodiscard]] const std::string& path() const { return path_; }

private:
    const TemporaryDirectory& directory_;
    std::string path_;
    std::string obstacle_;
    bool mounted_ = false;
};

TEST_F(NewFiles, AreWrittenInPlaceWhereTheOldFileCannotBeReplaced) {
    const Irreplaceable old(directory_);
    if (!old.obstacle().empty()) GTEST_SKIP() << old.obstacle();
    {
        const auto file = must(new_file(path_));
        EXPECT_NE(file.obstacle(), "");
        EXPECT_FALSE(file.is_incomplete());
        EXPECT_EQ(must(file.storage()->size()), 0U);
    }
    EXPECT_EQ(read_file(path_), "old contents, which are long") << "changed before there was anything to write";
    auto file = must(new_file(path_));
    EXPECT_TRUE(file.starts_as_zeros());
    EXPECT_TRUE(fails(new_file(path_), Errc::locked));
    must(file.storage()->write({2}, text_bytes("new")));
    EXPECT_TRUE(file.is_incomplete());
    EXPECT_EQ(read_file(path_), std::string("\0\0new", 5));
    std::string told;
    told_incomplete = &told;
    abandon_new_files([](const char* path, Incomplete) { *told_incomplete += path; });
    EXPECT_EQ(told, path_);
    must(file.publish());
    EXPECT_FALSE(file.is_incomplete());
}

TEST_F(NewFiles, LoseTheOldContentsWhenNothingWasWrittenInPlace) {
    const Irreplaceable old(directory_);
    if (!old.obstacle().empty()) GTEST_SKIP() << old.obstacle();
    must(must(new_file(path_)).publish());
    EXPECT_EQ(read_file(path_), "");
}

// ---- Without unnamed files ----

class NamedNewFiles : public NewFiles {
    NoUnnamedFiles none_;
};

TEST_F(NamedNewFiles, AreReplacedAndDroppedAsOthers) {
    {
        const auto file = written(path_);
        EXPECT_EQ(directory_.names().size(), 1U);
    }
    EXPECT_THAT(directory_.names(), IsEmpty());
    for (const std::string contents : {"first", "second"}) {
        auto file = written(path_, contents);
        must(file.publish());
        EXPECT_THAT(directory_.names(), ElementsAre("disk"));
        EXPECT_EQ(read_file(path_), contents);
    }
}

TEST_F(NamedNewFiles, AreRemovedWhenASignalEndsTheProcess) {
    write_file(path_, "old");
    auto file = written(path_);
    EXPECT_EQ(directory_.names().size(), 2U);
    abandon_new_files([](const char*, Incomplete) {});
    EXPECT_THAT(directory_.names(), ElementsAre("disk"));
}

TEST_F(NamedNewFiles, AreNotReadByOthersBeforeTheyReplaceAFile) {
    write_file(path_, "old");
    ASSERT_EQ(chmod(path_.c_str(), 0600), 0);
    const auto file = written(path_);
    for (const auto& name : directory_.names()) {
        struct stat status = {};
        ASSERT_EQ(stat((directory_ / name).c_str(), &status), 0);
        EXPECT_EQ(status.st_mode & 077, 0U) << name;
    }
}

// ---- Power loss ----

/// What a power loss may leave under a name: every system call may be the last one, and of the names that were given
/// since those of the directory were last made durable any may be lost, from the last one on.
class PowerLoss : public NewFiles, public testing::WithParamInterface<std::tuple<bool, bool>> {
protected:
    /// The file that the name leads to; 0: none.
    static ino_t inode(const std::string& path) {
        struct stat status = {};
        return stat(path.c_str(), &status) == 0 ? status.st_ino : 0;
    }

    /// Verifies all states after a power loss. `old` is the file that had the name.
    void verify(const std::vector<SystemCall>& calls, ino_t old) const {
        const auto verify_state = [&](std::size_t done, ino_t found) {
            if (found == old) return;
            bool whole = false;
            for (std::size_t i = 0; i < done; ++i)
                whole |= calls[i].kind == SystemCall::Kind::sync && calls[i].inode == found;
            EXPECT_TRUE(whole) << "after " << done << " calls the name may lead to contents that are not there";
        };
        ino_t durable = old;
        std::vector<ino_t> pending;
        for (std::size_t done = 0; done <= calls.size(); ++done) {
            verify_state(done, durable);
            for (const auto found : pending) verify_state(done, found);
            if (done == calls.size()) break;
            const auto& call = calls[done];
            if (call.kind == SystemCall::Kind::name && call.path == path_) pending.push_back(call.inode);
            if (call.kind == SystemCall::Kind::sync && call.inode == inode(directory_.path()) && !pending.empty()) {
                durable = pending.back();
                pending.clear();
            }
        }
        EXPECT_EQ(durable, inode(path_)) << "a power loss may take back what was reported as done";
        EXPECT_NE(durable, old);
    }
};

TEST_P(PowerLoss, LeavesTheOldFileOrTheWholeNewOne) {
    const auto [unnamed, replaced] = GetParam();
    std::optional<NoUnnamedFiles> none;
    if (!unnamed) none.emplace();
    if (replaced) write_file(path_, "old");
    const auto old = inode(path_);
    const SystemCalls calls;
    auto file = written(path_);
    must(file.publish());
    verify(calls.seen(), old);
}

INSTANTIATE_TEST_SUITE_P(All, PowerLoss, testing::Combine(testing::Bool(), testing::Bool()));

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
    EXPECT_TRUE(fails(new_file(path), Errc::not_found, {path, "cannot create"}));
}

TEST_F(NewFiles, DoNotReplaceADirectory) {
    const auto file = new_file(directory_ / ".");
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
    auto file = must(new_file(directory / "link"));
    must(file.publish());
    EXPECT_TRUE(std::filesystem::is_symlink(directory / "link"));
    EXPECT_TRUE(std::filesystem::exists(directory / "target"));
}

TEST(NewFile, PublishingTwiceIsPublishing) {
    const TemporaryDirectory directory;
    auto file = must(new_file(directory / "a"));
    must(file.publish());
    must(file.publish());
    EXPECT_EQ(directory.names(), std::set<std::string>{"a"});
}

TEST(NewFile, DoesNotReplaceOneThatWasMadeAndIsInUseMeanwhile) {
    const TemporaryDirectory directory;
    auto first = must(new_file(directory / "a"));
    auto second = must(new_file(directory / "a"));
    must(first.publish());
    EXPECT_TRUE(fails(second.publish(), Errc::locked));
}

TEST(NewFile, MayHaveTheLongestName) {
    const TemporaryDirectory directory;
    auto file = must(new_file(directory / std::string(255, 'n')));
    must(file.publish());
}

TEST(NewFile, NeedsAName) { EXPECT_TRUE(fails(new_file(""), Errc::invalid_argument)); }

}  // namespace
}  // namespace qcow
