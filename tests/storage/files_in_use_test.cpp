#include "qcow/files_in_use.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>

#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow {
namespace {

using namespace qcow::test;
using enum FilesInUse::Use;

class FilesInUseTest : public testing::Test {
protected:
    void SetUp() override {
        write_file(file_, "contents");
        std::filesystem::create_directory(directory_ / "sub");
    }

    TemporaryDirectory directory_;
    std::string file_ = directory_ / "file";
};

TEST_F(FilesInUseTest, MayBeReadInManyRoles) {
    FilesInUse in_use;
    must(in_use.add(read, file_, "the source"));
    must(in_use.add(read, file_, "its backing file"));
}

TEST_F(FilesInUseTest, AreTheSameUnderAllNames) {
    std::filesystem::create_symlink("file", directory_ / "symbolic");
    std::filesystem::create_symlink("symbolic", directory_ / "twice");
    std::filesystem::create_directory_symlink("sub", directory_ / "linked-sub");
    std::filesystem::create_hard_link(file_, directory_ / "hard");
    for (const auto* name : {"file", "./file", "sub/../file", "linked-sub/../file", "symbolic", "twice", "hard"}) {
        for (const bool written_first : {false, true}) {
            FilesInUse in_use;
            must(in_use.add(written_first ? written : read, file_, written_first ? "the target" : "the source"));
            EXPECT_TRUE(fails(in_use.add(written_first ? read : written, directory_ / name,
                                         written_first ? "the source" : "the target"),
                              Errc::invalid_argument, {name, "the target would overwrite the source"}));
        }
    }
}

TEST_F(FilesInUseTest, AreWrittenInOneRole) {
    FilesInUse in_use;
    must(in_use.add(written, file_, "the target"));
    EXPECT_TRUE(fails(in_use.add(written, file_, "its data file"), Errc::invalid_argument));
}

TEST_F(FilesInUseTest, NeedNotExist) {
    std::filesystem::create_symlink("absent", directory_ / "dangling");
    for (const auto* name : {"absent", "./absent", "sub/../absent", "dangling"}) {
        FilesInUse in_use;
        must(in_use.add(written, directory_ / "absent", "the target"));
        must(in_use.add(written, directory_ / "another", "the log"));
        must(in_use.add(written, directory_ / "sub/absent", "another target"));
        EXPECT_TRUE(fails(in_use.add(written, directory_ / name, "its data file"), Errc::invalid_argument,
                          {"its data file would overwrite the target"}));
    }
    FilesInUse in_use;
    must(in_use.add(written, directory_ / "no/such/directory", "the target"));
    must(in_use.add(written, directory_ / "no/such/directory", "the log"));
}

TEST_F(FilesInUseTest, LeaveOutWhatIsNoFile) {
    ASSERT_EQ(mkfifo((directory_ / "pipe").c_str(), 0600), 0);
    for (const auto& path : {directory_ / "pipe", std::string("/dev/null"), directory_ / "sub"}) {
        FilesInUse in_use;
        must(in_use.add(read, path, "standard input"));
        must(in_use.add(written, path, "standard output"));
    }
}

}  // namespace
}  // namespace qcow
