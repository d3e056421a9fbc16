// The handshake, byte by byte.

#include <gmock/gmock.h>

#include "server/running_server.h"

namespace qcow::test {
namespace {

using nbd::Info;
using nbd::Option;
using nbd::OptionReply;
using testing::ElementsAre;
using testing::SizeIs;

class Handshake : public testing::Test {
protected:
    Handshake() { client_.greet(); }

    static std::vector<NbdExport> exports() {
        NbdExport second{"second", "the other disk", std::make_shared<TestDisk>(1000), true, true};
        second.contexts.push_back(
            {"test:context", [](GuestOffset, std::uint64_t length, const auto& visit) -> Result<void> {
                 visit({length, 7});
                 return {};
             }});
        return {{"first", "", std::make_shared<TestDisk>(MiB)}, second};
    }

    std::vector<std::string> contexts(Option option, std::string_view name, const std::vector<std::string>& queries) {
        std::vector<std::string> names;
        for (const auto& reply : client_.ask(option, NbdClient::query_data(name, queries))) {
            if (reply.type == OptionReply::meta_context) names.push_back(reply.text().substr(4));
        }
        return names;
    }

    RunningServer server_{exports()};
    NbdClient client_{server_.socket()};
};

TEST_F(Handshake, ListsExports) {
    const auto replies = client_.ask(Option::list);
    ASSERT_THAT(replies, SizeIs(3));
    EXPECT_EQ(replies[0].data, with_length("first"));
    EXPECT_EQ(replies[1].data, (Wire() << with_length("second") << "the other disk").bytes);
    EXPECT_EQ(client_.outcome(Option::list, as_bytes("x")), OptionReply::invalid);
}

TEST_F(Handshake, TellsAboutAnExport) {
    const auto all = (Wire() << with_length("second") << std::uint16_t{3} << std::uint16_t{1} << std::uint16_t{2}
                             << std::uint16_t{99})
                         .bytes;
    const auto replies = client_.ask(Option::info, all);
    ASSERT_THAT(replies, SizeIs(5));
    EXPECT_EQ(replies[0].data, (Wire() << std::uint16_t{1} << "second").bytes);
    EXPECT_EQ(replies[1].data, (Wire() << std::uint16_t{2} << "the other disk").bytes);
    EXPECT_EQ(replies[2].data,
              (Wire() << std::uint16_t{3} << 1U << 65536U << static_cast<std::uint32_t>(32 * MiB)).bytes);
    const std::uint16_t read_only_with_flush_fua_multi_cache = 1 | 2 | 4 | 8 | 256 | 1024;
    EXPECT_EQ(replies[3].data,
              (Wire() << std::uint16_t{0} << std::uint64_t{1000} << read_only_with_flush_fua_multi_cache).bytes);
    EXPECT_EQ(replies[4].type, OptionReply::ack);
}

TEST_F(Handshake, TheEmptyNameIsTheFirstExport) {
    const auto replies = client_.ask(Option::go, NbdClient::go_data(""));
    ASSERT_EQ(replies.back().type, OptionReply::ack);
    const std::uint16_t writable = 1 | 4 | 8 | 32 | 64 | 256 | 1024 | 2048;
    EXPECT_EQ(replies[1].data, (Wire() << std::uint16_t{0} << MiB << writable).bytes);
    EXPECT_EQ(client_.write(0, as_bytes("after GO comes the transmission")), 0U);
}

TEST_F(Handshake, ExportsThatThereAreNot) {
    EXPECT_EQ(client_.outcome(Option::info, NbdClient::go_data("third")), OptionReply::unknown);
    EXPECT_EQ(client_.outcome(Option::go, NbdClient::go_data("firs")), OptionReply::unknown);
    EXPECT_EQ(client_.outcome(Option::go, NbdClient::go_data("first")), OptionReply::ack);
}

TEST_F(Handshake, ExportNameInTheOldWay) {
    client_.send_option(Option::export_name, as_bytes("second"));
    EXPECT_EQ(client_.number<std::uint64_t>(), 1000U);
    EXPECT_NE(client_.number<std::uint16_t>() & 2, 0);
    EXPECT_EQ(client_.command(nbd::Command::flush, 0, 0), 0U);

    NbdClient with_zeros(server_.socket());
    with_zeros.greet(1);
    with_zeros.send_option(Option::export_name, as_bytes("second"));
    EXPECT_EQ(with_zeros.receive(134).size(), 134U);
    EXPECT_EQ(with_zeros.command(nbd::Command::flush, 0, 0), 0U);

    NbdClient wrong(server_.socket());
    wrong.greet();
    wrong.send_option(Option::export_name, as_bytes("third"));
    EXPECT_TRUE(wrong.is_closed());
}

TEST_F(Handshake, MalformedOptionsAreRefusedAndTheNextIsServed) {
    const std::vector<Bytes> malformed = {
        {},
        (Wire() << 5U).bytes,
        (Wire() << 5U << "first").bytes,
        (Wire() << 5U << "first" << std::uint16_t{1}).bytes,
        (Wire() << 5U << "first" << std::uint16_t{0} << "x").bytes,
        (Wire() << 0xffffffffU << "first" << std::uint16_t{0}).bytes,
        (Wire() << 5000U << std::string(5000, 'x') << std::uint16_t{0}).bytes,
    };
    for (const auto& data : malformed) {
        EXPECT_EQ(client_.outcome(Option::info, data), OptionReply::invalid) << data.size();
        EXPECT_EQ(client_.outcome(Option::go, data), OptionReply::invalid) << data.size();
    }
    ASSERT_EQ(client_.outcome(Option::structured_reply), OptionReply::ack);
    for (const auto& data :
         {Bytes(), (Wire() << with_length("first")).bytes, (Wire() << with_length("first") << 1U).bytes,
          (Wire() << with_length("first") << 0xffffffffU).bytes, (Wire() << with_length("first") << 0U << "x").bytes})
        EXPECT_EQ(client_.outcome(Option::set_meta_context, data), OptionReply::invalid) << data.size();
    EXPECT_EQ(client_.outcome(Option::structured_reply, as_bytes("x")), OptionReply::invalid);
    EXPECT_EQ(client_.outcome(static_cast<Option>(4711), as_bytes("what is it?")), OptionReply::unsupported);
    EXPECT_EQ(client_.outcome(Option::starttls), OptionReply::policy);
    EXPECT_EQ(client_.outcome(static_cast<Option>(4711), Bytes(MiB)), OptionReply::too_big);
    EXPECT_EQ(client_.outcome(Option::go, NbdClient::go_data("first")), OptionReply::ack);
}

TEST_F(Handshake, Contexts) {
    // They need replies that have types.
    EXPECT_EQ(client_.outcome(Option::list_meta_context, NbdClient::query_data("second", {})), OptionReply::invalid);
    ASSERT_EQ(client_.outcome(Option::structured_reply), OptionReply::ack);
    EXPECT_THAT(contexts(Option::list_meta_context, "second", {}),
                ElementsAre("base:allocation", "qemu:allocation-depth", "test:context"));
    EXPECT_THAT(contexts(Option::list_meta_context, "first", {}), ElementsAre("base:allocation"));
    EXPECT_THAT(contexts(Option::list_meta_context, "second", {"qemu:", "test:other"}),
                ElementsAre("qemu:allocation-depth"));
    EXPECT_THAT(contexts(Option::set_meta_context, "second", {"test:context", "base:allocation", "other:"}),
                ElementsAre("base:allocation", "test:context"));
    EXPECT_THAT(contexts(Option::set_meta_context, "second", {"qemu:"}), ElementsAre());
    EXPECT_EQ(client_.outcome(Option::set_meta_context, NbdClient::query_data("third", {})), OptionReply::unknown);
}

TEST_F(Handshake, ContextsOfAnotherExportDoNotCount) {
    ASSERT_EQ(client_.outcome(Option::structured_reply), OptionReply::ack);
    EXPECT_THAT(contexts(Option::set_meta_context, "first", {"base:allocation"}), SizeIs(1));
    ASSERT_EQ(client_.outcome(Option::go, NbdClient::go_data("second")), OptionReply::ack);
    client_.send(client_.request(nbd::Command::block_status, 0, 1000));
    const auto magic = client_.receive(4);
    EXPECT_EQ(load_be<std::uint16_t>(client_.receive(4), 2), nbd::chunk_type::error);
}

TEST_F(Handshake, ExtendedHeadersIncludeStructuredReplies) {
    ASSERT_EQ(client_.outcome(Option::extended_headers), OptionReply::ack);
    EXPECT_EQ(client_.outcome(Option::structured_reply), OptionReply::extended_headers_required);
    const auto replies = client_.ask(Option::info, NbdClient::go_data("first"));
    EXPECT_NE(load_be<std::uint16_t>(replies[1].data, 10) & (1 << 12), 0);
}

TEST_F(Handshake, Abort) {
    EXPECT_EQ(client_.outcome(Option::abort), OptionReply::ack);
    EXPECT_TRUE(client_.is_closed());
}

TEST_F(Handshake, WhoDoesNotSpeakTheProtocolIsDisconnected) {
    client_.send(Wire() << "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    EXPECT_TRUE(client_.is_closed());
    NbdClient flags(server_.socket());
    flags.greet(4);
    EXPECT_TRUE(flags.is_closed());
    NbdClient again(server_.socket());
    again.go(nbd::Style::simple);
    EXPECT_EQ(again.command(nbd::Command::flush, 0, 0), 0U);
}

TEST_F(Handshake, EndlessHagglingIsEnded) {
    for (int i = 0; i < 999; ++i) ASSERT_EQ(client_.outcome(static_cast<Option>(99)), OptionReply::unsupported);
    EXPECT_EQ(client_.outcome(static_cast<Option>(99)), OptionReply::unsupported);
    EXPECT_TRUE(client_.is_closed());
}

TEST(Exports, WhatCannotBeServed) {
    const auto disk = std::make_shared<TestDisk>(MiB);
    EXPECT_TRUE(fails(NbdServer::make({}), Errc::invalid_argument, {"nothing"}));
    EXPECT_TRUE(fails(NbdServer::make({{"a", "", disk}, {"a", "", disk}}), Errc::invalid_argument, {"\"a\""}));
    EXPECT_TRUE(fails(NbdServer::make({{std::string(5000, 'a'), "", disk}}), Errc::invalid_argument, {"4096"}));
}

TEST(Exports, SocketsThatCannotBeListenedOn) {
    const TemporaryDirectory directory;
    const auto server = must(NbdServer::make({{"", "", std::make_shared<TestDisk>(MiB)}}));
    EXPECT_TRUE(fails(server->listen_unix(directory / "absent/socket"), Errc::not_found, {"absent/socket"}));
    EXPECT_TRUE(fails(server->listen_unix(std::string(200, 'x')), Errc::invalid_argument, {"bytes"}));
    write_file(directory / "file", "precious");
    EXPECT_TRUE(fails(server->listen_unix(directory / "file"), Errc::locked, {"file"}));
    EXPECT_EQ(read_file(directory / "file"), "precious");
    EXPECT_TRUE(fails(server->listen_inherited(0), Errc::invalid_argument, {"descriptor 0"}));
    EXPECT_TRUE(fails(server->listen_tcp("no such host", 0), Errc::not_found, {"no such host"}));

    must(server->listen_unix(directory / "socket"));
    const auto other = must(NbdServer::make({{"", "", std::make_shared<TestDisk>(MiB)}}));
    EXPECT_TRUE(fails(other->listen_unix(directory / "socket"), Errc::locked, {"socket"}));
}

TEST(Exports, ASocketThatADeadServerLeftIsReplaced) {
    const TemporaryDirectory directory;
    const auto path = directory / "socket";
    const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
    ASSERT_EQ(bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    close(fd);
    auto server = must(NbdServer::make({{"", "", std::make_shared<TestDisk>(MiB)}}));
    must(server->listen_unix(path));
    server.reset();
    EXPECT_FALSE(std::filesystem::exists(path));
}

}  // namespace
}  // namespace qcow::test
