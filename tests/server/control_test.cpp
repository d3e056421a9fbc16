// Commands for images in use, and the socket that takes them.

#include "qcow/control.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/bits.h"
#include "qcow/check.h"
#include "qcow/create.h"
#include "server/running_server.h"
#include "support/result.h"
#include "support/subprocess.h"
#include "support/temporary_directory.h"

namespace qcow::test {
namespace {

using nlohmann::json;
using testing::HasSubstr;

std::shared_ptr<Image> new_image(std::uint64_t size = MiB) {
    const auto storage = memory_storage();
    value_of(create_image({storage, nullptr}, {.size = size}));
    return value_of(open_image(storage, {.writable = true, .format = Format::qcow2}));
}

class ControlTest : public testing::Test {
protected:
    json send(const json& command) { return json::parse(control_.execute(command.dump())); }

    json execute(const std::string& command, const json& arguments = json::object()) {
        const auto answer = send({{"execute", command}, {"arguments", arguments}});
        EXPECT_TRUE(answer.contains("return")) << answer;
        return answer.value("return", json());
    }

    std::string error_of(const json& command) { return send(command).at("error").at("desc"); }

    std::string refusal(const std::string& command, const json& arguments) {
        return error_of({{"execute", command}, {"arguments", arguments}});
    }

    std::shared_ptr<Image> image_ = new_image();
    std::shared_ptr<Image> other_ = new_image();
    bool stopped_ = false;
    Control control_{{{"disk", image_}, {"other", other_, true}}, [this] { stopped_ = true; }};
};

TEST_F(ControlTest, Snapshots) {
    value_of(image_->write({0}, Bytes(512, std::byte{1})));
    const auto made = execute("blockdev-snapshot-internal-sync", {{"device", "disk"}, {"name", "one"}});
    EXPECT_EQ(made["id"], "1");
    EXPECT_EQ(made["virtual-size"], MiB);
    EXPECT_THAT(refusal("blockdev-snapshot-internal-sync", {{"device", "disk"}, {"name", "one"}}), HasSubstr("exists"));
    execute("blockdev-snapshot-internal-sync", {{"device", "disk"}, {"name", "two"}});
    value_of(image_->write({0}, Bytes(512, std::byte{2})));
    execute("blockdev-snapshot-apply-internal-sync", {{"device", "disk"}, {"name", "one"}});
    Bytes sector(512);
    value_of(image_->read({0}, sector));
    EXPECT_EQ(sector[0], std::byte{1});
    execute("blockdev-snapshot-rename-internal-sync", {{"device", "disk"}, {"id", "1"}, {"new-name", "two"}});
    EXPECT_THAT(refusal("blockdev-snapshot-delete-internal-sync", {{"device", "disk"}, {"name", "two"}}),
                HasSubstr("\"id\""));
    EXPECT_EQ(
        execute("blockdev-snapshot-delete-internal-sync", {{"device", "disk"}, {"name", "two"}, {"id", "2"}})["id"],
        "2");
    EXPECT_THAT(refusal("blockdev-snapshot-delete-internal-sync", {{"device", "disk"}, {"id", "2"}}),
                HasSubstr("no snapshot \"2\""));
    EXPECT_THAT(refusal("blockdev-snapshot-delete-internal-sync", {{"device", "disk"}}),
                HasSubstr("\"id\" or \"name\""));
    const auto nodes = execute("query-named-block-nodes");
    EXPECT_EQ(nodes[0]["image"]["snapshots"].size(), 1U);
    EXPECT_EQ(nodes[0]["node-name"], "disk");
    EXPECT_EQ(nodes[0]["ro"], false);
    EXPECT_EQ(nodes[1]["ro"], true);
    EXPECT_TRUE(value_of(image_->check({})).clean());
}

TEST_F(ControlTest, Bitmaps) {
    execute("block-dirty-bitmap-add", {{"node", "disk"}, {"name", "a"}, {"granularity", 65536}});
    execute("block-dirty-bitmap-add", {{"node", "other"}, {"name", "b"}});
    value_of(image_->write({0}, Bytes(512)));
    value_of(other_->write({512 * KiB}, Bytes(512)));
    const json merge = {
        {"type", "block-dirty-bitmap-merge"},
        {"data",
         {{"node", "disk"}, {"target", "c"}, {"bitmaps", json::array({"a", {{"node", "other"}, {"name", "b"}}})}}}};
    const json add = {{"type", "block-dirty-bitmap-add"},
                      {"data", {{"node", "disk"}, {"name", "c"}, {"disabled", true}, {"persistent", true}}}};
    EXPECT_THAT(refusal("transaction", {{"actions", json::array({merge, add})}}), HasSubstr("\"c\""));
    execute("transaction", {{"actions", json::array({add, merge})}});
    std::vector<std::uint64_t> dirty;
    value_of(image_->each_dirty("c", {0}, MiB, [&](const DirtyRun& run) -> Result<void> {
        if (run.dirty) dirty.push_back(run.start.value);
        return {};
    }));
    EXPECT_THAT(dirty, testing::ElementsAre(0, 512 * KiB));
    const auto bitmaps = execute("query-named-block-nodes")[0]["dirty-bitmaps"];
    ASSERT_EQ(bitmaps.size(), 2U);
    EXPECT_EQ(bitmaps[0]["recording"], true);
    EXPECT_EQ(bitmaps[1]["recording"], false);
    for (const auto* action : {"enable", "disable", "clear", "remove"})
        execute(std::string("block-dirty-bitmap-") + action, {{"node", "disk"}, {"name", "c"}});
    EXPECT_EQ(execute("query-named-block-nodes")[0]["dirty-bitmaps"].size(), 1U);
    const json elsewhere = {{"type", "block-dirty-bitmap-clear"}, {"data", {{"node", "other"}, {"name", "b"}}}};
    const json here = {{"type", "block-dirty-bitmap-clear"}, {"data", {{"node", "disk"}, {"name", "a"}}}};
    EXPECT_THAT(refusal("transaction", {{"actions", json::array({here, elsewhere})}}), HasSubstr("one image"));
    EXPECT_THAT(refusal("transaction", {{"actions", json::array({{{"type", "block_resize"}}})}}),
                HasSubstr("\"block_resize\""));
}

TEST_F(ControlTest, TheSize) {
    execute("block_resize", {{"device", "disk"}, {"size", 2 * MiB}});
    EXPECT_EQ(image_->size(), 2 * MiB);
    EXPECT_THAT(refusal("block_resize", {{"device", "disk"}, {"size", MiB}}), HasSubstr("\"shrink\": true"));
    execute("block_resize", {{"device", "disk"}, {"size", MiB}, {"shrink", true}});
    EXPECT_EQ(image_->size(), MiB);
    execute("flush", {{"node-name", "disk"}});
}

TEST_F(ControlTest, Errors) {
    const auto answer = json::parse(control_.execute(R"({"execute": "x", "id": [7]})"));
    EXPECT_EQ(answer["id"], json({7}));
    EXPECT_EQ(answer["error"]["class"], "CommandNotFound");
    EXPECT_THAT(error_of({{"execute", 5}}), HasSubstr("\"execute\""));
    EXPECT_THAT(error_of({{"execute", "flush"}, {"argument", 1}}), HasSubstr("no member \"argument\""));
    EXPECT_THAT(error_of({{"execute", "flush"}, {"arguments", 1}}), HasSubstr("must be an object"));
    EXPECT_THAT(refusal("flush", json::object()), HasSubstr("\"disk\", \"other\""));
    EXPECT_THAT(refusal("flush", {{"device", "none"}}), HasSubstr("\"none\""));
    EXPECT_THAT(refusal("flush", {{"device", "disk"}, {"node", "disk"}}), HasSubstr("twice"));
    EXPECT_THAT(refusal("flush", {{"device", 1}}), HasSubstr("must be a string"));
    EXPECT_THAT(refusal("flush", {{"device", "disk"}, {"speed", 1}}), HasSubstr("no argument \"speed\""));
    EXPECT_THAT(refusal("block_resize", {{"device", "disk"}}), HasSubstr("\"size\" is missing"));
    EXPECT_THAT(refusal("block_resize", {{"device", "disk"}, {"size", -1}}), HasSubstr("whole number"));
    EXPECT_THAT(control_.execute(R"({"execute": "flush", "execute": "quit"})"),
                HasSubstr("\\\"execute\\\" is there twice"));
    EXPECT_THAT(execute("query-commands"), testing::Not(testing::IsEmpty()));
    for (const auto& text : {std::string("["), std::string(), std::string("\xff"), std::string(10000, '['),
                             "{\"execute\":" + std::string(50000, '[')}) {
        EXPECT_TRUE(json::parse(control_.execute(text)).contains("error"));
    }
    EXPECT_THAT(control_.execute("{\"execute\": \"" + std::string(Control::max_command, 'x')), HasSubstr("at most"));
    EXPECT_FALSE(stopped_);
    execute("quit");
    EXPECT_TRUE(stopped_);
    Control without_quit({{"disk", image_}});
    EXPECT_THAT(without_quit.execute(R"({"execute": "quit"})"), HasSubstr("CommandNotFound"));
    EXPECT_THAT(without_quit.execute(R"({"execute": "query-commands"})"), testing::Not(HasSubstr("quit")));
}

/// A client of the socket.
class ControlClient {
public:
    explicit ControlClient(const std::string& path) : fd_(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
        sockaddr_un address = {};
        address.sun_family = AF_UNIX;
        path.copy(address.sun_path, sizeof address.sun_path - 1);
        connected_ = connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
    }
    ControlClient(const ControlClient&) = delete;
    ControlClient& operator=(const ControlClient&) = delete;
    ~ControlClient() { close(fd_); }

    [[nodiscard]] bool connected() const { return connected_; }
    void send(std::string_view text) const {
        while (!text.empty()) {
            const auto sent = ::send(fd_, text.data(), text.size(), MSG_NOSIGNAL);
            if (sent <= 0) return;
            text.remove_prefix(static_cast<std::size_t>(sent));
        }
    }

    /// The next line; empty: the server has closed the connection.
    std::string line() {
        std::string result;
        for (char c = 0; recv(fd_, &c, 1, 0) == 1;) {
            if (c == '\n') return result;
            result += c;
        }
        return {};
    }

private:
    int fd_;
    bool connected_ = false;
};

class ControlSocketTest : public ControlTest {
protected:
    ControlSocketTest() {
        thread_ = std::thread([this] { result_ = server_->run(); });
    }
    ~ControlSocketTest() override {
        server_->stop();
        thread_.join();
        EXPECT_TRUE(result_);
    }

    TemporaryDirectory directory_;
    const std::string path_ = directory_ / "control";
    std::unique_ptr<ControlServer> server_ = value_of(ControlServer::listen_unix(path_, control_));
    Result<void> result_;
    std::thread thread_;
};

TEST_F(ControlSocketTest, AnswersALineWithALine) {
    struct stat status = {};
    ASSERT_EQ(stat(path_.c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 0777U, 0600U);
    ControlClient client(path_);
    ControlClient second(path_);
    EXPECT_TRUE(json::parse(client.line()).contains("QMP"));
    client.send("{\"execute\": \"flush\", \"arguments\": {\"device\": \"disk\"}, \"id\": 1}\r\n\n{\"execute\":");
    EXPECT_EQ(client.line(), R"({"id":1,"return":{}})");
    client.send(" \"query-commands\"}\n{\"execute\": \"x\"}\n");
    EXPECT_THAT(client.line(), HasSubstr("block_resize"));
    EXPECT_THAT(client.line(), HasSubstr("CommandNotFound"));
    EXPECT_TRUE(json::parse(second.line()).contains("QMP"));
    second.send("{\"execute\": \"qmp_capabilities\", \"arguments\": {\"enable\": 1}}\n");
    EXPECT_EQ(second.line(), R"({"return":{}})");
}

TEST_F(ControlSocketTest, FloodsAreCutOff) {
    {
        ControlClient endless(path_);
        endless.line();
        endless.send(std::string(2 * Control::max_command, 'x'));
        EXPECT_THAT(endless.line(), HasSubstr("at most"));
        EXPECT_EQ(endless.line(), "");
    }
    std::vector<std::unique_ptr<ControlClient>> clients;
    for (int i = 0; i < 30; ++i) clients.push_back(std::make_unique<ControlClient>(path_));
    for (int i = 0; i < 16; ++i) EXPECT_TRUE(json::parse(clients[static_cast<std::size_t>(i)]->line()).contains("QMP"));
    clients.erase(clients.begin(), clients.begin() + 16);
    for (const auto& client : clients) EXPECT_TRUE(json::parse(client->line()).contains("QMP"));
    // One that vanishes in the middle of a line, or without reading.
    clients.front()->send("{\"execute\"");
    clients.back()->send("{\"execute\": \"query-commands\"}\n{\"execute\": \"query-commands\"}\n");
    clients.clear();
    ControlClient last(path_);
    EXPECT_TRUE(json::parse(last.line()).contains("QMP"));
}

/// The disk is written while snapshots and bitmaps come and go. Clients of NBD learn of a new size.
TEST_F(ControlSocketTest, BesideNbd) {
    RunningServer nbd({{"", "", image_}});
    std::atomic<bool> over = false;
    std::thread writer([&] {
        for (std::uint64_t n = 0; !over; ++n) value_of(image_->write({n * 4096 % MiB}, Bytes(4096, std::byte{1})));
    });
    ControlClient client(path_);
    client.line();
    for (int i = 0; i < 20; ++i) {
        for (const std::string command :
             {R"("blockdev-snapshot-internal-sync", "arguments": {"device": "disk", "name": "passing"})",
              R"("block-dirty-bitmap-add", "arguments": {"node": "disk", "name": "passing"})",
              R"("block-dirty-bitmap-remove", "arguments": {"node": "disk", "name": "passing"})",
              R"("blockdev-snapshot-delete-internal-sync", "arguments": {"device": "disk", "name": "passing"})"}) {
            client.send("{\"execute\": " + command + "}\n");
            EXPECT_THAT(client.line(), HasSubstr("return"));
        }
    }
    client.send(R"({"execute": "block_resize", "arguments": {"device": "disk", "size": 3145728}})"
                "\n");
    EXPECT_THAT(client.line(), HasSubstr("return"));
    over = true;
    writer.join();
    EXPECT_EQ(must_run({"nbdinfo", "--size", "nbd+unix:///?socket=" + nbd.socket()}).out, "3145728\n");
    EXPECT_TRUE(must_stop(nbd));
    EXPECT_TRUE(value_of(image_->check({})).clean());
}

}  // namespace
}  // namespace qcow::test
