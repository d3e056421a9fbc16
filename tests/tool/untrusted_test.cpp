// Images from strangers, as the commands open them: with and without --untrusted.

#include "support/effort.h"
#include "support/named_files.h"
#include "tool/tool_fixture.h"

namespace qcow::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using Role = FileReference::Role;

class Untrusted : public testing::Test {
protected:
    [[nodiscard]] Finished tool(const std::string& arguments) const {
        return Subprocess({"sh", "-c", "echo xyz | " QCOW_TOOL " " + arguments}, files_.images())
            .finish(std::chrono::seconds(20));
    }

    void expect_done(const std::string& arguments) const {
        const auto finished = tool(arguments);
        EXPECT_EQ(finished.status, 0) << finished.text();
    }

    /// One line of what is wrong, and nothing was opened for long.
    void expect_refused(const std::string& arguments, const testing::Matcher<std::string>& message) const {
        const auto finished = tool(arguments);
        EXPECT_EQ(finished.status, 1) << finished.text();
        EXPECT_THAT(finished.err, message) << finished.text();
        EXPECT_EQ(std::ranges::count(finished.err, '\n'), 1) << finished.text();
    }

    NamedFiles files_;
};

TEST_F(Untrusted, EveryName) {
    for (const auto& file : fewer(files_.all())) {
        for (const auto role : {Role::backing_file, Role::data_file}) {
            for (const bool untrusted : {false, true}) {
                SCOPED_TRACE(file.name);
                const auto granted = untrusted ? file.untrusted : file.trusted;
                for (const std::string command : {"read -f qcow2 top 0 1", "write -f qcow2 top 0"}) {
                    files_.make_image("top", role, file.name);
                    const auto arguments = command + (untrusted ? " --untrusted" : "");
                    if (granted == Granted::yes) {
                        expect_done(arguments);
                    } else {
                        expect_refused(arguments, HasSubstr("top"));
                    }
                }
                if (untrusted || role == Role::backing_file) {
                    EXPECT_TRUE(files_.is_outside_untouched());
                }
                files_.reset();
            }
        }
    }
}

/// Why this option is there.
TEST_F(Untrusted, ADataFileIsAWayToWriteAnywhere) {
    files_.make_image("top", Role::data_file, "../outside");
    expect_done("write -f qcow2 top 0");
    EXPECT_EQ(file_bytes(files_.outside()).substr(0, 4), "xyz\n");
}

TEST_F(Untrusted, EveryCommand) {
    put_file(files_.images() / "source", std::string(named_size, 'x'));
    for (const std::string command :
         {"info --backing-chain -f qcow2 top", "info --usage -f qcow2 top", "map -f qcow2 top", "check -f qcow2 top",
          "read -f qcow2 top 0 1", "convert -f qcow2 top out", "convert -n -f raw -O qcow2 source top",
          "convert -O qcow2 -B top -F qcow2 -f raw source out", "create -b top -F qcow2 out", "write -f qcow2 top 0",
          "zero -f qcow2 top 0 4k", "discard -f qcow2 top 0 64k", "resize -f qcow2 top 128k",
          "serve -f qcow2 --socket s top", "serve --read-only -f qcow2 --socket s top"}) {
        for (const auto role : {Role::backing_file, Role::data_file}) {
            SCOPED_TRACE(command);
            files_.make_image("top", role, "../outside");
            const auto refused = tool(command + " --untrusted");
            EXPECT_EQ(refused.status, 1) << refused.text();
            EXPECT_THAT(refused.out + refused.err, HasSubstr("lies outside")) << refused.text();
            EXPECT_FALSE(std::filesystem::exists(files_.images() / "out"));
            EXPECT_TRUE(files_.is_outside_untouched());
            if (command.starts_with("serve")) continue;
            files_.make_image("top", role, "base");
            expect_done(command + " --untrusted");
            files_.make_image("top", role, "../outside");
            expect_done(command);
            files_.reset();
            std::filesystem::remove(files_.images() / "out");
        }
    }
}

TEST_F(Untrusted, AFormatThatIsGuessed) {
    files_.make_image("top", Role::backing_file, "base");
    expect_done("read top 0 1");
    expect_refused("read --untrusted top 0 1", AllOf(HasSubstr("top"), HasSubstr("guessed"), HasSubstr("format")));
    expect_done("info --untrusted top");
    expect_done("read --untrusted -f qcow2 top 0 1");
    files_.make_image("alone", Role::backing_file, "");
    expect_done("read --untrusted alone 0 1");
}

TEST_F(Untrusted, ARawDiskThatIsServedWithoutSayingSo) {
    const auto starts = [&](const std::string& options) {
        Subprocess server({"sh", "-c", "exec " QCOW_TOOL " serve --persistent --port 0 " + options + " base"},
                          files_.images());
        server.wait_for("listening on");
        server.signal(SIGTERM);
        return server.finish().err;
    };
    EXPECT_THAT(starts(""), AllOf(HasSubstr("base"), HasSubstr("guessed"), HasSubstr("--format raw")));
    EXPECT_THAT(starts("-f raw"), testing::Not(HasSubstr("guessed")));
    EXPECT_THAT(starts("--read-only"), testing::Not(HasSubstr("guessed")));
}

TEST_F(Untrusted, TheImageThatIsNamedByTheUser) {
    expect_refused("read --untrusted -f raw fifo 0 1", HasSubstr("fifo"));
    expect_refused("read --untrusted -f raw /dev/zero 0 1", HasSubstr("/dev/zero"));
    // It is the user's choice, wherever it lies.
    expect_done("read --untrusted -f raw ../outside 0 1");
    expect_done("read --untrusted -f raw link-out 0 1");
}

}  // namespace
}  // namespace qcow::test
