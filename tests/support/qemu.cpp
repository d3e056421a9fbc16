#include "support/qemu.h"

namespace qcow::test {

Finished qemu_img(Arguments arguments, const std::filesystem::path& directory) {
    arguments.insert(arguments.begin(), "qemu-img");
    return run(arguments, directory);
}

Finished must_qemu_img(Arguments arguments, const std::filesystem::path& directory) {
    arguments.insert(arguments.begin(), "qemu-img");
    return must_run(arguments, directory);
}

void make_encrypted_image(const std::string& name, const std::string& size, const std::filesystem::path& directory) {
    constexpr int most = 50;
    const Arguments create = {
        "create", "-q",    "--object", "secret,id=s,data=x",
        "-f",     "qcow2", "-o",       "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        name,     size};
    for (int i = 0; i < most; ++i) {
        if (qemu_img(create, directory).status == 0) return;
    }
    must_qemu_img(create, directory);
}

nlohmann::json qemu_img_json(const Arguments& arguments, const std::filesystem::path& directory) {
    return nlohmann::json::parse(must_qemu_img(arguments, directory).out);
}

void must_qemu_io(const std::string& image, const std::string& format, const std::vector<std::string>& commands,
                  const std::filesystem::path& directory) {
    // Nothing that tests make needs to survive power loss.
    Arguments arguments = {"qemu-io", "-t", "unsafe", "-f", format};
    for (const auto& command : commands) {
        arguments.emplace_back("-c");
        arguments.push_back(command);
    }
    arguments.push_back(image);
    const auto finished = must_run(arguments, directory);
    if (finished.out.find("failed") != std::string::npos) throw std::runtime_error("unexpected: " + finished.text());
}

void qemu_convert_to_raw(const std::string& image, const std::string& format, const std::string& target,
                         const std::string& snapshot, const std::filesystem::path& directory) {
    Arguments arguments = {"convert", "-t", "unsafe", "-f", format, "-O", "raw"};
    if (!snapshot.empty()) arguments.insert(arguments.end(), {"-l", "snapshot.name=" + snapshot});
    arguments.insert(arguments.end(), {image, target});
    must_qemu_img(arguments, directory);
}

}  // namespace qcow::test
