#pragma once
// A directory with disks whose files a test reads and changes with the tool.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "support/random.h"
#include "tool/tool_fixture.h"

namespace qcow::test {

class InsideTest : public testing::Test {
protected:
    [[nodiscard]] Finished tool(Arguments arguments) const {
        arguments.insert(arguments.begin(), QCOW_TOOL);
        return run(arguments, directory_.path());
    }
    Finished must_tool(const Arguments& arguments) const {
        auto finished = tool(arguments);
        EXPECT_EQ(finished.status, 0) << finished.text();
        EXPECT_EQ(finished.err, "") << finished.text();
        return finished;
    }
    void expect_refusal(const Arguments& arguments, const testing::Matcher<std::string>& message) const {
        const auto finished = tool(arguments);
        EXPECT_EQ(finished.status, 1) << finished.text();
        EXPECT_THAT(finished.err, testing::AllOf(testing::StartsWith("qcow: "), message)) << finished.text();
    }
    std::string shell(const std::string& script) const {
        return must_run({"bash", "-euc", script}, directory_.path()).out;
    }

    /// A tree with every kind of file, in "tree".
    void make_tree() const {
        shell(R"SH(mkdir -p tree/a/b/c tree/empty tree/many
            cd tree
            echo hello > a/f; ln a/f a/hard; ln -s ../f a/b/link; ln -s /etc/passwd absolute
            ln -s "$(printf 'x%.0s' $(seq 200))" long-link
            head -c 300000 /dev/urandom > a/big
            mkfifo pipe; mknod null c 1 3; mknod device b 300 70000
            python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")'
            truncate -s 3M sparse; printf X | dd of=sparse bs=1 seek=1000000 conv=notrunc status=none
            printf Y >> sparse
            for i in $(seq 200); do echo $i > many/file-with-a-rather-long-name-$i; done
            echo odd > "$(printf 'odd\n\377name')"
            setfattr -n user.test -v value a/f; setfacl -m u:1000:rw a/big
            setfattr -n user.long -v "$(printf 'y%.0s' $(seq 300))" a/big
            chown 1234:70000 a/f; chmod 4755 a/f; chmod 1777 empty
            touch -d '2001-02-03 04:05:06.123456789' a/f; touch -h -d '1999-02-03 04:05:06.5' absolute
            touch -d 2020-01-01 empty a/b many a .)SH");
    }

    /// What rsync would have to do to make "out" what "tree" is. (mke2fs gives the root directory a time of its own.)
    [[nodiscard]] std::string differences(const Arguments& options = {"-H"}) const {
        Arguments command = {"rsync", "-aAXni", "--delete", "--checksum", "--exclude=/lost+found"};
        command.insert(command.end(), options.begin(), options.end());
        command.insert(command.end(), {"tree/", "out/"});
        auto found = must_run(command, directory_.path()).out;
        constexpr std::string_view root = ".d..t...... ./\n";
        return found.starts_with(root) ? found.substr(root.size()) : found;
    }

    void make_ext(const std::string& name, const std::string& options, const std::string& size = "32M") const {
        shell("truncate -s " + size + " " + name + "; mke2fs -q -F " + options + " -d tree " + name);
    }

    void expect_sound(const std::string& name) const {
        const auto checked = run({"e2fsck", "-fn", name}, directory_.path());
        EXPECT_EQ(checked.status, 0) << checked.text();
    }

    TemporaryDirectory directory_;
};

}  // namespace qcow::test
