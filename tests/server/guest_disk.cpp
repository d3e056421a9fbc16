#include "server/guest_disk.h"

#include <thread>

namespace qcow::test {

GuestDisk::GuestDisk(Program program, std::string size, unsigned queues, Arguments options)
    : program_(program), queues_(queues), options_(std::move(options)) {
    must_qemu_img({"create", "-q", "-f", "qcow2", image_, std::move(size)});
    start();
}

void GuestDisk::start() {
    const auto queues = std::to_string(queues_);
    const auto pid = directory_ / "pid";
    std::filesystem::remove(pid);
    // To a file: a pipe that nobody reads would stop a server that has much to complain about.
    Arguments command = {"sh", "-c", "exec \"$@\" 2>>log", "sh"};
    const auto add = [&](const Arguments& words) { command = joined_arguments(std::move(command), words); };
    if (program_ == Program::qcow) {
        add({QCOW_TOOL, "serve", "--persistent", "--vhost-user", socket_, "--queues", queues, "--pid-file", pid});
        if (read_only_) add({"--read-only"});
        add(options_);
        add({image_});
    } else {
        const std::string access = read_only_ ? ",read-only=on" : ",discard=unmap";
        add({"qemu-storage-daemon", "--pidfile", pid});
        add({"--blockdev", "driver=file,node-name=file,filename=" + image_ + access});
        add({"--blockdev", "driver=qcow2,node-name=disk,file=file" + access});
        add({"--export", "type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path=" + socket_ +
                             ",num-queues=" + queues + (read_only_ ? "" : ",writable=on")});
    }
    server_ = std::make_unique<Subprocess>(command, directory_.path());
    for (int i = 0; i < 10000 && !std::filesystem::exists(pid); ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (!std::filesystem::exists(pid)) {
        server_->signal(SIGKILL);
        throw std::runtime_error("it does not start: " + server_->finish().text() + read_file(directory_ / "log"));
    }
}

void GuestDisk::stop() {
    server_->signal(SIGTERM);
    const auto finished = server_->finish();
    if (finished.status != 0) throw std::runtime_error(finished.text() + read_file(directory_ / "log"));
}

void GuestDisk::kill() {
    server_->signal(SIGKILL);
    server_->finish();
}

void GuestDisk::restart_read_only() {
    stop();
    read_only_ = true;
    start();
}

}  // namespace qcow::test
