#include "confined.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <ctime>
#include <utility>

#include "confined_messages.h"
#include "qcow/text.h"
#include "qcow/try.h"
#include "sandbox.h"

namespace tool {
namespace {

using messages::piece_bytes;
using messages::put;
using messages::Reader;
using messages::receive;
using messages::Request;
using messages::send;
using messages::take_attributes;
using messages::take_error;
using messages::take_info;
using messages::take_type;
using messages::Writer;
using qcow::DirectoryEntry;
using qcow::Errc;
using qcow::Error;
using qcow::FileExtent;
using qcow::FileInfo;
using qcow::FileSystem;
using qcow::FileSystemInfo;
using qcow::Inode;
using qcow::Result;

constexpr std::uint64_t memory_bytes = std::uint64_t{1} << 30;
constexpr std::uint64_t seconds_a_request = 120;  // the parent raises the limit before each

// ---- The confined process ----

class Server {
public:
    Server(int socket, const Confined& confined) : socket_(socket), confined_(confined) {}

    /// Opens the file system, answers whether that went well, and then all requests.
    void run() {
        auto opened = open();
        Writer reply;
        finish(reply, opened);
        if (opened) reply.number(files_->root());
        if (!send(socket_, reply) || !opened) return;
        while (auto request = receive(socket_)) {
            Writer answered;
            answer(*request, answered);
            if (!send(socket_, answered)) return;
        }
    }

private:
    Result<void> open() {
        auto disk = QCOW_TRY(confined_.open());
        silence();
        qcow::load_file_systems();
        Sandbox sandbox;
        sandbox.limits = {memory_bytes, seconds_a_request, confined_.access == qcow::Access::write};
        QCOW_TRY(enter_sandbox(sandbox));
        files_ = QCOW_TRY(qcow::open_file_system(std::move(disk), confined_.access));
        return {};
    }

    /// Nothing that a library prints is to reach a terminal.
    static void silence() {
        const int null = ::open("/dev/null", O_RDWR | O_CLOEXEC);
        for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
            if (null >= 0) dup2(null, fd);
            if (null < 0) ::close(fd);
        }
    }

    template <class T>
    static bool finish(Writer& reply, const Result<T>& result) {
        reply.number(result ? 1 : 0);
        if (result) return true;
        put(reply, result.error());
        return false;
    }

    void answer(Reader& request, Writer& reply) {
        const auto kind = static_cast<Request>(request.number());
        const Inode inode = request.number();
        switch (kind) {
            case Request::info: return answer_info(reply);
            case Request::stat: {
                const auto info = files_->stat(inode);
                if (finish(reply, info)) put(reply, *info);
                return;
            }
            case Request::list: return answer_list(inode, request.number() != 0, reply);
            case Request::lookup: {
                const auto entry = files_->lookup(inode, std::string(request.text()));
                if (!finish(reply, entry)) return;
                reply.number(entry->inode);
                reply.number(static_cast<std::uint64_t>(entry->type));
                return;
            }
            case Request::read: {
                const auto at = request.number();
                buffer_.resize(std::min<std::uint64_t>(request.number(), piece_bytes));
                const auto done = files_->read(inode, at, buffer_);
                if (finish(reply, done)) reply.bytes(std::span(buffer_).first(*done));
                return;
            }
            case Request::extents: {
                const auto extents = files_->extents(inode, request.number());
                if (!finish(reply, extents)) return;
                reply.number(extents->size());
                for (const auto& extent : *extents) {
                    reply.number(extent.at);
                    reply.number(extent.length);
                    reply.optional(extent.stored ? std::optional(extent.stored->value) : std::nullopt);
                }
                return;
            }
            case Request::read_link: {
                const auto target = files_->read_link(inode);
                if (finish(reply, target)) reply.text(*target);
                return;
            }
            case Request::attributes: {
                const auto attributes = files_->attributes(inode);
                if (finish(reply, attributes)) put(reply, *attributes);
                return;
            }
            case Request::create: {
                const std::string name(request.text());
                qcow::NewNode node;
                node.info = take_info(request);
                node.link_target = request.text();
                node.attributes = take_attributes(request);
                const auto made = files_->create(inode, name, node);
                if (finish(reply, made)) reply.number(*made);
                return;
            }
            case Request::write: {
                const auto at = request.number();
                finish(reply, files_->write(inode, at, request.bytes(piece_bytes)));
                return;
            }
            case Request::truncate: finish(reply, files_->truncate(inode, request.number())); return;
            case Request::remove: finish(reply, files_->remove(inode, std::string(request.text()))); return;
            case Request::replace: {
                const std::string from(request.text());
                finish(reply, files_->replace(inode, from, std::string(request.text())));
                return;
            }
            case Request::close: {
                auto closed = files_->close();
                if (confined_.close) {
                    auto ended = confined_.close();
                    if (closed) closed = std::move(ended);
                }
                finish(reply, closed);
                return;
            }
        }
    }

    void answer_info(Writer& reply) {
        const auto info = files_->info();
        if (!finish(reply, info)) return;
        for (const auto& text : {info->type, info->label, info->uuid}) reply.text(text);
        reply.number(info->block_bytes);
        reply.number(info->bytes);
        for (const auto& value : {info->free_bytes, info->inodes, info->free_inodes}) reply.optional(value);
        reply.number(info->warnings.size());
        for (const auto& warning : info->warnings) reply.text(warning);
    }

    void answer_list(Inode inode, bool deleted, Writer& reply) {
        std::vector<qcow::Error> refused;
        const auto entries = files_->list(inode, deleted, &refused);
        if (!finish(reply, entries)) return;
        reply.number(refused.size());
        for (const auto& error : refused) put(reply, error);
        reply.number(entries->size());
        for (const auto& entry : *entries) {
            reply.text(entry.name);
            reply.number(entry.inode);
            reply.number(static_cast<std::uint64_t>(entry.type));
            reply.number(entry.deleted ? 1 : 0);
        }
    }

    int socket_;
    const Confined& confined_;
    std::unique_ptr<FileSystem> files_;
    std::vector<std::byte> buffer_;
};

// ---- The process that asks ----

class ConfinedFileSystem final : public FileSystem {
public:
    ConfinedFileSystem(pid_t child, int socket) : child_(child), socket_(socket) {}
    ~ConfinedFileSystem() override {
        ::close(socket_);
        if (child_ > 0) {
            kill(child_, SIGKILL);
            wait();
        }
    }

    /// Receives what opening gave.
    Result<void> await_opened() {
        auto reply = QCOW_TRY(received());
        root_ = reply.number();
        return verify(reply);
    }

    [[nodiscard]] Inode root() const override { return root_; }

protected:
    Result<FileSystemInfo> do_info() override {
        auto reply = QCOW_TRY(ask(message(Request::info, 0)));
        FileSystemInfo info;
        for (auto* const text : {&info.type, &info.label, &info.uuid}) *text = reply.text();
        info.block_bytes = reply.number();
        info.bytes = reply.number();
        for (auto* const value : {&info.free_bytes, &info.inodes, &info.free_inodes}) *value = reply.optional();
        const auto count = reply.count(100, 8);
        for (std::size_t i = 0; i < count; ++i) info.warnings.push_back(qcow::printable(reply.text(), 1000));
        QCOW_TRY_VOID(verify(reply));
        return info;
    }

    Result<FileInfo> do_stat(Inode inode) override {
        auto reply = QCOW_TRY(ask(message(Request::stat, inode)));
        const auto info = take_info(reply);
        QCOW_TRY_VOID(verify(reply));
        return info;
    }

    Result<std::vector<DirectoryEntry>> do_list(Inode directory, bool deleted,
                                                std::vector<qcow::Error>& refused) override {
        auto request = message(Request::list, directory);
        request.number(deleted ? 1 : 0);
        auto reply = QCOW_TRY(ask(request));
        refused.resize(reply.count(100, 24));
        for (auto& error : refused) error = take_error(reply);
        std::vector<DirectoryEntry> entries(reply.count(most_entries, 32));
        for (auto& entry : entries) {
            entry.name = reply.text();
            entry.inode = reply.number();
            entry.type = take_type(reply);
            entry.deleted = reply.number(1) == 1;
        }
        QCOW_TRY_VOID(verify(reply));
        return entries;
    }

    Result<DirectoryEntry> do_lookup(Inode directory, const std::string& name) override {
        auto request = message(Request::lookup, directory);
        request.text(name);
        auto reply = QCOW_TRY(ask(request));
        DirectoryEntry entry{name, reply.number(), take_type(reply), false};
        QCOW_TRY_VOID(verify(reply));
        return entry;
    }

    Result<std::size_t> do_read(Inode inode, std::uint64_t at, std::span<std::byte> to) override {
        auto request = message(Request::read, inode);
        request.number(at);
        const auto part = to.first(std::min(to.size(), piece_bytes));
        request.number(part.size());
        auto reply = QCOW_TRY(ask(request));
        const auto bytes = reply.bytes(part.size());
        std::ranges::copy(bytes, part.begin());
        QCOW_TRY_VOID(verify(reply));
        return bytes.size();
    }

    Result<std::vector<FileExtent>> do_extents(Inode inode, std::uint64_t at) override {
        auto request = message(Request::extents, inode);
        request.number(at);
        auto reply = QCOW_TRY(ask(request));
        std::vector<FileExtent> extents(reply.count(most_extents, 32));
        for (auto& extent : extents) {
            extent.at = reply.number();
            extent.length = reply.number();
            if (const auto stored = reply.optional()) extent.stored = qcow::GuestOffset{*stored};
        }
        QCOW_TRY_VOID(verify(reply));
        return extents;
    }

    Result<std::string> do_read_link(Inode inode) override {
        auto reply = QCOW_TRY(ask(message(Request::read_link, inode)));
        std::string target(reply.text(longest_link));
        QCOW_TRY_VOID(verify(reply));
        return target;
    }

    Result<std::vector<qcow::Attribute>> do_attributes(Inode inode) override {
        auto reply = QCOW_TRY(ask(message(Request::attributes, inode)));
        auto attributes = take_attributes(reply);
        QCOW_TRY_VOID(verify(reply));
        return attributes;
    }

    Result<Inode> do_create(Inode directory, const std::string& name, const qcow::NewNode& node) override {
        auto request = message(Request::create, directory);
        request.text(name);
        put(request, node.info);
        request.text(node.link_target);
        put(request, node.attributes);
        auto reply = QCOW_TRY(ask(request));
        const Inode made = reply.number();
        QCOW_TRY_VOID(verify(reply));
        return made;
    }

    Result<void> do_write(Inode inode, std::uint64_t at, std::span<const std::byte> from) override {
        while (!from.empty()) {
            const auto part = from.first(std::min(from.size(), piece_bytes));
            auto request = message(Request::write, inode);
            request.number(at);
            request.bytes(part);
            QCOW_TRY_VOID(command(request));
            at += part.size();
            from = from.subspan(part.size());
        }
        return {};
    }

    Result<void> do_truncate(Inode inode, std::uint64_t size) override {
        auto request = message(Request::truncate, inode);
        request.number(size);
        return command(request);
    }

    Result<void> do_remove(Inode directory, const std::string& name) override {
        auto request = message(Request::remove, directory);
        request.text(name);
        return command(request);
    }

    Result<void> do_replace(Inode directory, const DirectoryEntry& from, const DirectoryEntry& to) override {
        auto request = message(Request::replace, directory);
        request.text(from.name);
        request.text(to.name);
        return command(request);
    }

    Result<void> do_close() override { return command(message(Request::close, 0)); }

private:
    static Writer message(Request kind, Inode inode) {
        Writer request;
        request.number(static_cast<std::uint64_t>(kind));
        request.number(inode);
        return request;
    }

    Result<Reader> ask(const Writer& request) {
        if (child_ <= 0) return std::unexpected(ended_);
        raise_time_limit();
        if (!send(socket_, request)) return ended();
        return received();
    }

    Result<void> command(const Writer& request) {
        auto reply = QCOW_TRY(ask(request));
        return verify(reply);
    }

    /// The reply, behind the mark of success.
    Result<Reader> received() {
        auto reply = receive(socket_);
        if (!reply) return ended();
        if (reply->number(1) == 1) return *std::move(reply);
        auto error = take_error(*reply);
        QCOW_TRY_VOID(verify(*reply));
        return std::unexpected(std::move(error));
    }

    /// Verifies that a reply was complete. A process that was taken over gets no second chance.
    Result<void> verify(const Reader& reply) {
        if (reply.complete()) return {};
        kill(child_, SIGKILL);
        wait();
        ended_ = {Errc::corrupt, "file system", "the process that reads it gave an answer that makes no sense"};
        return std::unexpected(ended_);
    }

    void raise_time_limit() const {
        clockid_t clock = {};
        timespec used = {};
        if (clock_getcpuclockid(child_, &clock) != 0 || clock_gettime(clock, &used) != 0) return;
        const rlimit limit{static_cast<rlim_t>(used.tv_sec) + seconds_a_request, RLIM_INFINITY};
        prlimit(child_, RLIMIT_CPU, &limit, nullptr);
    }

    int wait() {
        int status = 0;
        while (waitpid(child_, &status, 0) < 0 && errno == EINTR) {
        }
        child_ = -1;
        return status;
    }

    /// The process has gone. Says why.
    std::unexpected<Error> ended() {
        kill(child_, SIGKILL);  // if it only closed its socket
        const int status = wait();
        ended_ = {Errc::corrupt, "file system", "the process that reads it ended without an answer"};
        if (WIFSIGNALED(status) && WTERMSIG(status) == SIGXCPU) {
            ended_.code = Errc::limit_exceeded;
            ended_.what = fmt::format(
                "reading it took more than {} s of processor time: it is damaged, or made to stop its readers",
                seconds_a_request);
        } else if (WIFSIGNALED(status) && WTERMSIG(status) != SIGKILL) {
            ended_.what = fmt::format("its reader crashed ({}): it is damaged, or made to attack its readers",
                                      strsignal(WTERMSIG(status)));
        }
        return std::unexpected(ended_);
    }

    pid_t child_;
    int socket_;
    Inode root_ = 0;
    Error ended_;
};

}  // namespace

Result<std::unique_ptr<FileSystem>> open_confined(const Confined& confined) {
    std::array<int, 2> sockets = {};
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets.data()) != 0)
        return std::unexpected(Error{Errc::limit_exceeded, "", "cannot make a socket: too many open files"});
    std::fflush(nullptr);
    const pid_t parent = getpid();
    const pid_t child = fork();
    if (child < 0)
        return std::unexpected(Error{Errc::limit_exceeded, "", "cannot start a process for the file system"});
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent) _exit(1);
        close(sockets[0]);
        try {
            Server(sockets[1], confined).run();
        } catch (const std::bad_alloc&) {
            _exit(2);
        }
        _exit(0);
    }
    close(sockets[1]);
    auto files = std::make_unique<ConfinedFileSystem>(child, sockets[0]);
    QCOW_TRY_VOID(files->await_opened());
    return files;
}

}  // namespace tool
