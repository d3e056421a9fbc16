#include "support/subprocess.h"

namespace qcow::test {

std::string Finished::text() const { return command + "\nexit status " + std::to_string(status) + "\n" + out + err; }

Subprocess::Subprocess(const std::vector<std::string>& argv, const std::filesystem::path& directory) {
    for (const auto& word : argv) command_ += (command_.empty() ? "" : " ") + word;
    std::array<std::array<int, 2>, 3> pipes = {};
    for (auto& pipe : pipes) {
        if (pipe2(pipe.data(), O_CLOEXEC) != 0) fail("pipe2", errno);
    }
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, pipes[0][0], STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, pipes[1][1], STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&actions, pipes[2][1], STDERR_FILENO);
    if (!directory.empty()) posix_spawn_file_actions_addchdir_np(&actions, directory.c_str());
    std::vector<char*> words;
    for (const auto& word : argv) words.push_back(const_cast<char*>(word.c_str()));
    words.push_back(nullptr);
    // Without a terminal: nothing is to ask a person who runs the tests for a key.
    posix_spawnattr_t attributes;
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID);
    const int error = posix_spawnp(&pid_, words[0], &actions, &attributes, words.data(), environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    close(pipes[0][0]);
    close(pipes[1][1]);
    close(pipes[2][1]);
    in_ = pipes[0][1];
    out_ = pipes[1][0];
    err_ = pipes[2][0];
    if (error != 0) {
        pid_ = -1;
        close_pipes();
        fail("cannot be started", error);
    }
}

Subprocess::~Subprocess() {
    if (pid_ > 0) {
        kill(pid_, SIGKILL);
        waitpid(pid_, nullptr, 0);
    }
    close_pipes();
}

void Subprocess::write(const std::string& text) {
    for (std::size_t done = 0; done < text.size();) {
        const auto n = ::write(in_, text.data() + done, text.size() - done);
        if (n < 0) fail("does not read its input", errno);
        done += static_cast<std::size_t>(n);
    }
}

void Subprocess::close_input() {
    if (in_ >= 0) close(in_);
    in_ = -1;
}

void Subprocess::wait_for(const std::string& text, std::chrono::seconds timeout) {
    const auto deadline = Clock::now() + timeout;
    while ((finished_.out + finished_.err).find(text) == std::string::npos) {
        if (!collect(deadline)) throw std::runtime_error(command_ + ": no \"" + text + "\" in " + seen());
    }
}

Finished Subprocess::finish(std::chrono::seconds timeout) {
    close_input();
    const auto deadline = Clock::now() + timeout;
    while (out_ >= 0 || err_ >= 0) {
        if (!collect(deadline) && Clock::now() >= deadline)
            throw std::runtime_error(command_ + ": still running after " + std::to_string(timeout.count()) + " s");
    }
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = -1;
    finished_.status = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    finished_.command = command_;
    return finished_;
}

bool Subprocess::collect(Clock::time_point deadline) {
    std::array<pollfd, 2> polled = {pollfd{out_, POLLIN, 0}, pollfd{err_, POLLIN, 0}};
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (out_ < 0 && err_ < 0) return false;
    if (poll(polled.data(), polled.size(), static_cast<int>(left < 0 ? 0 : left)) <= 0) return false;
    if (polled[0].revents != 0) take(out_, finished_.out);
    if (polled[1].revents != 0) take(err_, finished_.err);
    return true;
}

void Subprocess::take(int& fd, std::string& to) {
    std::array<char, 65536> buffer;
    const auto n = read(fd, buffer.data(), buffer.size());
    if (n > 0) {
        to.append(buffer.data(), static_cast<std::size_t>(n));
    } else if (n == 0 || errno != EINTR) {
        close(fd);
        fd = -1;
    }
}

[[noreturn]] void Subprocess::fail(const std::string& what, int error) const {
    throw std::runtime_error(command_ + ": " + what + ": " + std::strerror(error));
}

void Subprocess::close_pipes() {
    for (int* fd : {&in_, &out_, &err_}) {
        if (*fd >= 0) close(*fd);
        *fd = -1;
    }
}

Finished run(const std::vector<std::string>& argv, const std::filesystem::path& directory) {
    return Subprocess(argv, directory).finish();
}

Finished must_run(const std::vector<std::string>& argv, const std::filesystem::path& directory) {
    auto finished = run(argv, directory);
    if (finished.status != 0) throw std::runtime_error("unexpected: " + finished.text());
    return finished;
}

}  // namespace qcow::test
