#include "server/running_server.h"

namespace qcow::test {

RunningServer::RunningServer(std::vector<NbdExport> exports, const NbdOptions& options)
    : server_(must(NbdServer::make(std::move(exports), options))) {
    must(server_->listen_unix(socket()));
    thread_ = std::thread([this] { result_ = server_->run(); });
}

RunningServer::~RunningServer() {
    if (thread_.joinable()) static_cast<void>(stop());
}

Result<void> RunningServer::stop() {
    server_->stop();
    return wait();
}

Result<void> RunningServer::wait() {
    thread_.join();
    return result_;
}

testing::AssertionResult must_stop(RunningServer& server) {
    const auto begin = std::chrono::steady_clock::now();
    const auto result = server.stop();
    if (!result) return testing::AssertionFailure() << result.error().message();
    if (std::chrono::steady_clock::now() - begin > std::chrono::seconds(4))
        return testing::AssertionFailure() << "it took as long as the server waits for those that are stuck";
    return testing::AssertionSuccess();
}

}  // namespace qcow::test
